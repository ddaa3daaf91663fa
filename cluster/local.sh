#!/usr/bin/env bash
# A cluster of this machine, or of a few own machines, with token authentication.
#
#   cluster/local.sh head [flags of ray start]             here; prints how to join it and how to send it jobs
#   cluster/local.sh join HOST:PORT [flags of ray start]   on each further machine
#   cluster/local.sh stop                                  ends what one of the two started here, and nothing else
#
# PORT and DASHBOARD_PORT choose the head's ports (default: any free ones). Whoever has the token may run code on the
# cluster: it is RAY_AUTH_TOKEN, or else ~/.ray/auth_token, which `head` makes if need be and which you copy to the
# machines that join. NANOCHAT_RAY_NODE is the folder that remembers the process (default: ~/.nanochat_ray_node).
set -euo pipefail

here="$(cd "$(dirname "$0")/.." && pwd)"
node="${NANOCHAT_RAY_NODE:-$HOME/.nanochat_ray_node}"
start_s=120
stop_s=40  # more than the drain that Ray grants running work on SIGTERM

fail() { echo "error: $1" >&2; exit "${2:-1}"; }
usage() { sed -n '2,/^set/{/^set/d; s/^# \{0,1\}//p}' "$0"; }

[ -x "$here/.venv/bin/ray" ] && PATH="$here/.venv/bin:$PATH"  # jobs then find this `python`, too
command -v ray > /dev/null || fail "there is no ray here; run 'make install' first"
export RAY_AUTH_MODE=token  # else `ray start` protects the cluster only if it happens to find a token
export RAY_USAGE_STATS_ENABLED="${RAY_USAGE_STATS_ENABLED:-0}"
# As nanochat_ray/serve/app.py sets them where jobs.serve starts the cluster: streamed chunks cost less CPU.
export RAY_SERVE_PROXY_USE_GRPC=1 RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD=0 RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP=0

free_ports() {  # of one moment, so that no two are the same
    python -c 'import socket, sys
sockets = [socket.create_server(("", 0)) for _ in range(int(sys.argv[1]))]
print(*(each.getsockname()[1] for each in sockets))' "$1"
}

session() { ps -o pid= -s "$1" 2> /dev/null || true; }  # the processes that our `ray start` has brought up

start() {
    if [ -e "$node/pid" ]; then
        [ -z "$(session "$(cat "$node/pid")")" ] || fail "a node started from $node runs already; 'cluster/local.sh stop' ends it"
    fi
    mkdir -p "$node"
    # A session of its own: it outlives this terminal, and `stop` knows by it what is ours.
    # Worker ports: Ray's fixed range could belong to another cluster on this machine.
    setsid nohup ray start --block --min-worker-port=0 --max-worker-port=0 "$@" > "$node/log" 2>&1 < /dev/null &
    echo $! > "$node/pid"
    for _ in $(seq $((start_s * 5))); do
        grep -q "Ray runtime started" "$node/log" && return
        kill -0 "$(cat "$node/pid")" 2> /dev/null || break
        sleep 0.2
    done
    tail -n 20 "$node/log" >&2
    stop
    fail "Ray did not start; its output is above and in $node/log"
}

head() {
    if [ -z "${RAY_AUTH_TOKEN:-}" ] && [ ! -s "${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}" ]; then
        ray get-auth-token --generate > /dev/null
    fi
    read -r port dashboard agent client <<< "$(free_ports 4)"
    port="${PORT:-$port}" dashboard="${DASHBOARD_PORT:-$dashboard}"
    # A head that goes takes its cluster with it: there is nobody to whom a drain would leave time.
    export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0
    # The dashboard, which takes jobs, stays on loopback: Ray's default, and other machines reach it through ssh.
    start --head --port="$port" --dashboard-port="$dashboard" --dashboard-agent-listen-port="$agent" \
        --ray-client-server-port="$client" "$@"
    address="$(sed -n "s/.*--address='\([^']*\)'.*/\1/p" "$node/log" | sed 1q)"
    cat << END
Ray runs at $address. Send it jobs from the root of the repository:
    export RAY_AUTH_MODE=token RAY_API_SERVER_ADDRESS=http://127.0.0.1:$dashboard
    ray job submit --working-dir . -- python -m jobs.pretrain --run first --preset tiny --storage /path/that/all/share
A further machine joins, with the same token, by
    cluster/local.sh join $address
END
}

stop() {
    [ -e "$node/pid" ] || fail "nothing was started from $node"
    leader="$(cat "$node/pid")"
    if ! ps -o args= -p "$leader" | grep -q "ray start"; then  # gone, and its number may be another program's by now
        rm "$node/pid"
        echo "what was started from $node has ended already"
        return
    fi
    kill -TERM "$leader"
    for _ in $(seq $((stop_s * 5))); do
        kill -0 "$leader" 2> /dev/null || break
        sleep 0.2
    done
    for pid in $(session "$leader"); do kill -KILL "$pid" 2> /dev/null || true; done  # Ray leaves its GCS running
    rm "$node/pid"
}

case "${1:-}" in
    head) head "${@:2}" ;;
    join)
        [ -n "${2:-}" ] || fail "join needs HOST:PORT, which 'cluster/local.sh head' prints" 2
        start --address="$2" "${@:3}"
        echo "this machine has joined the cluster at $2; 'cluster/local.sh stop' takes it out again"
        ;;
    stop) stop ;;
    -h | --help) usage ;;
    *) usage >&2; exit 2 ;;
esac
