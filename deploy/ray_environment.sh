# For a terminal that speaks to Ray, in this repository's folder:
#
#   source deploy/ray_environment.sh [RUN_ROOT]
#
# installs into .venv/ what is missing (make install), activates it, and makes Ray's token, ~/.ray/auth_token, unless there is one that only you can read.
# RUN_ROOT: where the runs of jobs go, on several machines a folder that all of them see, or an object store's URI.
make --no-print-directory install && . .venv/bin/activate || return
export RAY_AUTH_MODE=token
# Where the head starts: how long a job has after `ray job stop` to end what it started. Ray's default is 3 s.
export RAY_JOB_STOP_WAIT_TIME_S=60
if [ -n "${1-}" ]; then
    export RM_ROBUST_RUN_ROOT="$1"
fi
# Where a pipeline started a local Ray, Ray 2.60 has written the token as the umask is: everybody on the machine may have read it.
if [ -n "$(find -H ~/.ray/auth_token -perm -040 -o -perm -004 2> /dev/null)" ]; then
    rm -f ~/.ray/auth_token || return
    echo "Others could read ~/.ray/auth_token: a new token takes its place. Stop, and start again, every cluster and run that began with the old one." >&2
fi
(umask 077 && unset RAY_AUTH_TOKEN RAY_AUTH_TOKEN_PATH && ray get-auth-token --generate > /dev/null 2>&1) \
    || { echo "ray get-auth-token --generate failed" >&2; return 1; }
