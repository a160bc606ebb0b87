#!/usr/bin/env bash
# A real Slurm cluster on one machine, for tests and experiments: four nodes, partitions main and urgent (urgent
# preempts main), all files in one folder. It listens only on loopback if the machine's name resolves to a
# loopback address; otherwise it listens on all addresses, and says so.
#
#   slurm/cluster.sh install                       Debian packages, as root
#   slurm/cluster.sh up DIR                        leaves alone what runs; down first, to change a setting
#   slurm/cluster.sh start|stop DIR DAEMON         one daemon: n1, n2, n3, n4, slurmctld, munge
#   slurm/cluster.sh down DIR
#
# DIR is a folder of the cluster's own, in whose path Slurm's configuration allows no white space, quotes, #, % and \.
# To let clients find it:  export SLURM_CONF=DIR/slurm.conf
# PORT_BASE (default 17000) is the first of the 5 ports it uses; change it to run two clusters side by side.
# CPUS (default 2) is the number of CPUs that each node has for Slurm, which only counts them.
# DIR/site.conf may hold your own lines of slurm.conf, e.g. "Prolog=/path"; "up" includes them.
set -euo pipefail

PORT_BASE=${PORT_BASE:-17000}
CPUS=${CPUS:-2}
NODES=(n1 n2 n3 n4)
DAEMONS=("${NODES[@]}" slurmctld munge)
WAIT_SECONDS=60
PATH=$PATH:/usr/sbin:/sbin

fail() {
    echo "error: $*" >&2
    exit 2
}

install_packages() {
    if command -v slurmctld slurmd munged sbatch >/dev/null; then return; fi
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || fail "Slurm is not installed; as root on Debian: $0 install"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge >/dev/null
}

# Configuration.

write_conf() {
    # Slurm can be told to listen on one address instead of all; it takes the one to which the machine's name resolves.
    local own ADDRESS LISTEN
    own=$(getent ahostsv4 "$(hostname)" | awk 'NR == 1 { print $1 }') || true
    case $own in
        127.*) ADDRESS=$own LISTEN="CommunicationParameters=NoInAddrAny,NoCtldInAddrAny" ;;
        *)
            ADDRESS=127.0.0.1 LISTEN=
            echo "note: Slurm listens on all addresses of this machine, as its name resolves to ${own:-none}, which is" \
                "not on loopback; with a line '127.0.0.1 $(hostname)' at the top of /etc/hosts it is loopback only" >&2
            ;;
    esac
    cat >"$DIR/slurm.conf" <<CONF
ClusterName=hfprune
$LISTEN
SlurmctldHost=localhost($ADDRESS)
SlurmctldPort=$PORT_BASE
SlurmctldParameters=preempt_send_user_signal
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its old credential has expired.
AuthInfo=socket=$DIR/munge/munge.socket,cred_expire=5
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/run/slurmctld.pid
SlurmdPidFile=$DIR/run/%n.pid
SlurmctldLogFile=$DIR/logs/slurmctld.log
SlurmdLogFile=$DIR/logs/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=30
SchedulerParameters=bf_interval=1,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
JobAcctGatherType=jobacct_gather/linux
NodeName=n[1-4] NodeHostname=localhost NodeAddr=$ADDRESS Port=[$((PORT_BASE + 1))-$((PORT_BASE + 4))] CPUs=$CPUS RealMemory=4000
PartitionName=main Nodes=n[1-4] Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE
PartitionName=urgent Nodes=n[1-4] MaxTime=INFINITE PriorityTier=2 PreemptMode=OFF
CONF
    cat "$DIR/site.conf" >>"$DIR/slurm.conf" 2>/dev/null || true
    echo "CgroupPlugin=disabled" >"$DIR/cgroup.conf"
}

# Daemons: each writes its pid to DIR/run, and is stopped only by that pid.

program_of() {
    case $1 in
        munge) echo munged ;;
        slurmctld) echo slurmctld ;;
        n[1-4]) echo slurmd ;;
    esac
}

port_of() {
    case $1 in
        slurmctld) echo "$PORT_BASE" ;;
        n[1-4]) echo $((PORT_BASE + ${1#n})) ;;
    esac
}

is_running() {
    local pid
    # After a restart of the machine, another process may have the pid, so the program's name must match too. It may
    # have a suffix: slurmd-wlm on Debian, if a daemon has re-executed itself.
    pid=$(cat "$DIR/run/$1.pid" 2>/dev/null) && [[ "$(cat "/proc/$pid/comm" 2>/dev/null)" == "$(program_of "$1")"* ]]
}

# Processes of this cluster, with or without a pid file: those of its programs that have files in this folder open, are
# told of such files, or run with this cluster's configuration.
left_over() {
    local pattern process
    pattern=$(sed 's/[][*?\\]/\\&/g' <<<"$DIR")
    for process in $({
        find /proc/[0-9]*/fd -lname "$pattern/*"
        grep -lzE "^(--[a-z-]+=)?$(sed 's/[][*?\\.^$(){}+|]/\\&/g' <<<"$DIR")/" /proc/[0-9]*/cmdline
        grep -lzxF -e "SLURM_CONF=$DIR/slurm.conf" /proc/[0-9]*/environ
    } 2>/dev/null | cut -d / -f 3 | sort -u); do
        case $(cat "/proc/$process/comm" 2>/dev/null) in
            slurmctld* | slurmd* | slurmstepd* | slurmscriptd* | munged) echo "$process" ;;
        esac
    done
}

# Kills processes and all of their descendants, since the tasks of a step outlive it.
kill_trees() {
    local process
    for process in "$@"; do
        # shellcheck disable=SC2046 # one word per process
        kill_trees $(pgrep --parent "$process")
        kill -KILL "$process" 2>/dev/null || true
    done
}

refuse_taken_ports() {
    local daemon port
    for daemon in "${DAEMONS[@]}"; do
        port=$(port_of "$daemon")
        if [ -n "$port" ] && ! is_running "$daemon" && (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
            fail "port $port, for $daemon, is in use, by another cluster perhaps; set PORT_BASE to the first of 5 free ports"
        fi
    done
}

# Returns when the daemon has written its pid file; by then it is in the background and listens.
start() {
    is_running "$1" && return
    case $1 in
        munge) start_munge ;;
        slurmctld) slurmctld -f "$DIR/slurm.conf" ;;
        n[1-4]) slurmd -N "$1" -f "$DIR/slurm.conf" ;;
    esac 9>&- # the lock belongs to this command, not to the daemon
    wait_for "$1" is_running "$1"
}

start_munge() {
    local munge=$DIR/munge
    [ -s "$munge/key" ] || (umask 077 && head -c 128 /dev/urandom >"$munge/key")
    munged --socket "$munge/munge.socket" --key-file "$munge/key" --pid-file "$DIR/run/munge.pid" \
        --log-file "$munge/munged.log" --seed-file "$munge/seed"
}

stop() {
    is_running "$1" || return 0
    local pid
    pid=$(cat "$DIR/run/$1.pid")
    kill "$pid"
    for _ in $(seq 100); do
        kill -0 "$pid" 2>/dev/null || break
        sleep 0.1
    done
    if is_running "$1"; then kill -9 "$pid" 2>/dev/null || true; fi
    rm -f "$DIR/run/$1.pid"
}

wait_for() {
    local what=$1
    shift
    for _ in $(seq $((WAIT_SECONDS * 5))); do
        "$@" >/dev/null 2>&1 </dev/null && return
        sleep 0.2
    done
    fail "$what did not come up within $WAIT_SECONDS s; see the logs in $DIR/logs"
}

# Commands.

nodes_are_usable() {
    local states
    states=$(sinfo --noheader --Node --partition=main --format=%T) &&
        [ "$(wc -l <<<"$states")" = ${#NODES[@]} ] && ! grep -qvE '^(idle|mixed|allocated)$' <<<"$states"
}

up() {
    install_packages
    refuse_taken_ports
    mkdir -p "$DIR"/{logs,run,state} "${NODES[@]/#/$DIR/spool/}"
    mkdir -p -m 755 "$DIR/munge"
    chmod a+x "$DIR" # munged requires its socket to be reachable by everyone
    is_running slurmctld || write_conf
    for daemon in munge slurmctld "${NODES[@]}"; do start "$daemon"; done
    wait_for "the cluster" nodes_are_usable
    echo "up: export SLURM_CONF=$DIR/slurm.conf"
}

down() {
    if is_running slurmctld; then
        timeout 10 scancel --user="$(id -un)" || true
        for _ in $(seq 50); do
            [ -n "$(timeout 5 squeue --noheader 2>/dev/null)" ] || break
            sleep 0.2
        done
    fi
    for daemon in "${NODES[@]}" slurmctld; do stop "$daemon" & done # at once, as each takes seconds
    wait
    stop munge
    # Daemons that have lost their pid files or not written them yet, and job steps that no slurmctld could end. This
    # is repeated, since a daemon that goes into the background becomes another process a moment later.
    local processes
    for _ in $(seq 50); do
        processes=$(left_over)
        [ -n "$processes" ] || break
        # shellcheck disable=SC2086 # one word per process
        kill_trees $processes
        sleep 0.1
    done
    echo "down: $DIR"
}

# The command line.

case ${1:-} in
    install) wanted=1 ;;
    up | down) wanted=2 ;;
    start | stop) wanted=3 ;;
    *) fail "unknown command '${1:-}'; valid: install, up, down, start, stop" ;;
esac
[ $# = $wanted ] || fail "usage: see the top of this file; $1 takes $((wanted - 1)) argument(s)"
command=$1 FOLDER=${2:-} DAEMON=${3:-}
if [ "$command" = install ]; then
    install_packages
    exit
fi
DIR=$(realpath -m -- "$FOLDER")
if [ "$command" = up ]; then
    [[ $DIR != *[[:space:]\"\'\#%\\]* ]] ||
        fail "$DIR: can't be in Slurm's configuration; give a folder without white space, quotes, #, % and \\ in its path"
    mkdir -p "$DIR" 2>/dev/null || fail "$FOLDER: can't be made; give a folder that can be written to"
else
    [ -f "$DIR/slurm.conf" ] || fail "$FOLDER: no cluster there; start one with: $0 up DIR"
fi
export SLURM_CONF=$DIR/slurm.conf
# Only one command at a time, since a daemon that one of them is starting has no pid file yet for the others to see.
exec 9>"$DIR/lock"
flock 9
if [ -n "$DAEMON" ]; then
    [[ " ${DAEMONS[*]} " == *" $DAEMON "* ]] || fail "unknown daemon '$DAEMON'; valid: ${DAEMONS[*]}"
    # Without munge a daemon ends at once, and silently because it has gone into the background.
    [ "$command $DAEMON" = "start munge" ] || [ "$command" = stop ] || is_running munge ||
        fail "$FOLDER: the cluster is down, so $DAEMON can't run; start it with: $0 up $FOLDER"
fi
"$command" ${DAEMON:+"$DAEMON"}
