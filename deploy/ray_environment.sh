# For a terminal that speaks to Ray, in this repository's folder:
#
#   source deploy/ray_environment.sh [RUN_ROOT]
#
# installs into .venv/ what is missing (make install), activates it, and makes Ray's token, ~/.ray/auth_token, unless there is one.
# RUN_ROOT: where the runs of jobs go, on several machines a folder that all of them see, or an object store's URI.
make --no-print-directory install && . .venv/bin/activate || return
export RAY_AUTH_MODE=token
# Where the head starts: how long a job has after `ray job stop` to end what it started. Ray's default is 3 s.
export RAY_JOB_STOP_WAIT_TIME_S=60
if [ -n "${1-}" ]; then
    export RM_ROBUST_RUN_ROOT="$1"
fi
ray get-auth-token --generate > /dev/null 2>&1 || { echo "ray get-auth-token --generate failed" >&2; return 1; }
chmod 600 ~/.ray/auth_token  # Ray 2.60 lets everybody on the machine read it
