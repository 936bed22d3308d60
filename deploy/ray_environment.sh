# Prepare a terminal for Ray, in this repository's folder:
#
#   source deploy/ray_environment.sh [RUN_ROOT]
#
# The script installs what is missing into .venv/ (make install) and activates it. It makes Ray's token,
# ~/.ray/auth_token, unless there is a token that only you can read. RUN_ROOT is the folder for the runs of jobs. With
# several machines, it must be a folder that all of them see, or the URI of an object store.
make --no-print-directory install && . .venv/bin/activate || return
export RAY_AUTH_MODE=token
# The head reads this when it starts: after `ray job stop`, a job has so many seconds to end what it started. Ray's
# default is 3.
export RAY_JOB_STOP_WAIT_TIME_S=60
if [ -n "${1-}" ]; then
    export RM_ROBUST_RUN_ROOT="$1"
fi
# When a pipeline starts a local Ray, Ray 2.60 writes the token with the permissions of the umask, so everybody on the
# machine may have read it.
if [ -n "$(find -H ~/.ray/auth_token -perm -040 -o -perm -004 2> /dev/null)" ]; then
    rm -f ~/.ray/auth_token || return
    echo "Others could read ~/.ray/auth_token: a new token takes its place. Stop, and start again," \
        "every cluster and run that began with the old one." >&2
fi
(umask 077 && unset RAY_AUTH_TOKEN RAY_AUTH_TOKEN_PATH && ray get-auth-token --generate > /dev/null 2>&1) \
    || { echo "ray get-auth-token --generate failed" >&2; return 1; }
