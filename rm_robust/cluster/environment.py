"""What a process of a cluster needs before it starts: environment variables, gloo's network interface, a free port."""

import json
import logging
import os
import socket

import psutil

from rm_robust.cluster.log_lines import FORMAT_VARIABLE

logger = logging.getLogger(__name__)

KEEPS_FREED_MEMORY = f"glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold={2**30}"
"""A value of GLIBC_TUNABLES, which a process reads when it starts: one heap of huge pages that keeps up to 1 GiB of
freed memory at its end. Otherwise the activations of every step are taken from the system and given back, which costs
15,000 page faults a step of the policy with 1 M parameters. Without these faults PolicyTrainer.measure of RLOO takes
0.18 s instead of 0.215 s, a reward-model step takes 6 to 8 per cent less time, and peak memory is the same (two cores,
float32, medians of three)."""
WORKER_ENVIRONMENT = {
    "GLIBC_TUNABLES": KEEPS_FREED_MEMORY,
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "50",
}
"""The environment variables of every worker. PASSIVE makes idle OpenMP threads sleep; by default they spin and take the
cores that trainer, engine and scorers share. Serve kills a proxy that is not ready after three checks, of 5 s each by
default. That is too short when every core is busy, hence the 50 s."""
DRIVER_VARIABLE = "RM_ROBUST_DRIVER"
"""The variable in the environment of every worker of a local Ray that names the driver it works for."""
INTERFACE_VARIABLE = "GLOO_SOCKET_IFNAME"
"""The environment variable that names the network interface of gloo."""


def worker_environment() -> dict[str, str]:
    """Return the environment variables of workers: WORKER_ENVIRONMENT, and how this process was told to log.

    Variables of the job's own runtime environment are left out: workers get them anyway, and Ray refuses to set a
    variable twice.
    """
    job_config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    job_variables = job_config.get("runtime_env", {}).get("env_vars", {})
    log_variables = {name: os.environ[name] for name in (FORMAT_VARIABLE, "TQDM_DISABLE") if name in os.environ}
    return {name: value for name, value in (WORKER_ENVIRONMENT | log_variables).items() if name not in job_variables}


def this_driver() -> str:
    """Return the value of DRIVER_VARIABLE for workers of this process."""
    return f"{os.getpid()} since {psutil.Process().create_time()}"


def listen_where_ray_does() -> None:
    """Make gloo groups that this process opens from now on use the interface of its node's Ray address.

    A GLOO_SOCKET_IFNAME that is already set stays. By default gloo takes the address of the machine's own name. Debian
    and Ubuntu write that into /etc/hosts as 127.0.1.1, which no other machine can reach.
    """
    if INTERFACE_VARIABLE in os.environ:
        return
    import ray

    address = ray.util.get_node_ip_address()
    interfaces = [
        name for name, entries in psutil.net_if_addrs().items() if address in [entry.address for entry in entries]
    ]
    if interfaces:
        os.environ[INTERFACE_VARIABLE] = interfaces[0]
    else:
        logger.warning(
            "No network interface has this node's Ray address %s, so gloo uses the address of the machine's name. "
            "If processes of several machines do not find each other, set %s on every node.",
            address,
            INTERFACE_VARIABLE,
        )


def cpu_environment(num_threads: int) -> dict[str, str]:
    """Return the variables of a CPU engine actor, for `runtime_env={"env_vars": ...}`.

    vLLM reads them at import, so the actor must start with them. The engine runs inside the actor's own process (no
    child processes), its operators are not compiled (the first compilation takes 13 s and a C++ compiler), and it
    computes with `num_threads` threads that are bound to no core. PASSIVE makes threads sleep when they have no work;
    by default they spin and take the cores from other processes. Measured with 2 threads on 2 busy cores and 0.36 M
    parameters: 900 tokens/s spinning, 12400 passive. The trainer needs PASSIVE too.

    KEEPS_FREED_MEMORY helps because a weight update allocates and frees the whole model. An update then takes 10 page
    faults instead of 100 thousand (100 M parameters), and packing an output head of 100 MB takes 36 ms instead of 67.
    """
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "TORCHDYNAMO_DISABLE": "1",
        "OMP_NUM_THREADS": str(num_threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "GLIBC_TUNABLES": KEEPS_FREED_MEMORY,
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "PYTHONWARNINGS": "ignore::FutureWarning",
    }


def free_port(host: str) -> int:
    """Return a TCP port of `host` on which nobody listens ("" means every interface).

    Another process may take it before the caller does.
    """
    with socket.socket() as listener:
        listener.bind((host, 0))
        return int(listener.getsockname()[1])
