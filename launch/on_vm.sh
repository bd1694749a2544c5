#!/usr/bin/env bash
# What `tpu.sh` has every TPU VM do. It comes with the code and runs there; nobody calls it by hand.
#
#   on_vm.sh setup  WORKDIR DATA          huge pages, bucket, Python, packages, data
#   on_vm.sh start  WORKDIR DATA ARG...   `b2txt train` in the background; survives the ssh session
#   on_vm.sh status WORKDIR               b2txt-status: finished | running | exited N | absent
#   on_vm.sh stop                         SIGTERM: the step ends, the state is saved
#   on_vm.sh doctor WORKDIR ARG...        `b2txt doctor`
#   on_vm.sh log                          the last lines that training wrote
#
# WORKDIR: gs://BUCKET/FOLDER or a folder of this machine. DATA: gs://BUCKET/FOLDER, or empty: it was
# copied to ~/b2txt_data.
set -euo pipefail

code=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
data_folder=$HOME/b2txt_data
mount_point=$HOME/b2txt_bucket
state=$HOME/.b2txt_train
python_version=3.11 # constraints.txt is for this one; TPU images come with an older Python

say() { printf '%s: %s\n' "$(hostname)" "$*"; }
fail() {
  printf '%s: error: %s\n' "$(hostname)" "$*" >&2
  exit 2
}

# gs://BUCKET/FOLDER -> the same folder through the mounted bucket.
local_path() {
  case $1 in
    gs://*)
      local rest=${1#gs://}
      printf '%s/%s' "$mount_point" "${rest#*/}"
      ;;
    *) printf '%s' "$1" ;;
  esac
}

huge_pages() {
  local setting=/sys/kernel/mm/transparent_hugepage/enabled
  [ -e "$setting" ] || return 0
  # The TPU runtime starts and stops faster with them on v5e and newer.
  sudo sh -c "echo always > $setting" || say "huge pages could not be set; b2txt doctor says more"
}

mount_bucket() {
  local bucket=${1#gs://}
  bucket=${bucket%%/*}
  if ! command -v gcsfuse >/dev/null; then
    local list=/etc/apt/sources.list.d/gcsfuse.list key=/usr/share/keyrings/cloud.google.asc
    curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
      sudo tee "$list" >/dev/null
    # A fresh VM may be updating itself: wait for the lock.
    sudo apt-get -o DPkg::Lock::Timeout=600 -qq update
    sudo apt-get -o DPkg::Lock::Timeout=600 -qq install -y gcsfuse
  fi
  mkdir -p "$mount_point"
  if ! mountpoint -q "$mount_point"; then
    # No caching of what exists: all workers look at one folder, and the answer must be the bucket's.
    gcsfuse --metadata-cache-ttl-secs=0 "$bucket" "$mount_point"
  fi
}

python_environment() {
  cd "$code"
  if ! command -v uv >/dev/null; then
    export PATH=$HOME/.local/bin:$PATH
    command -v uv >/dev/null || python3 -m pip install --quiet --user uv ||
      curl -LsSf https://astral.sh/uv/install.sh | sh # where pip may not install for a user
  fi
  [ -x .venv/bin/python ] || uv venv --quiet --python "$python_version" .venv
  uv pip install --quiet --python .venv/bin/python -c constraints.txt -e '.[tpu]'
}

setup() {
  local workdir=$1 data=$2
  huge_pages
  case $workdir in gs://*) mount_bucket "$workdir" ;; esac
  python_environment
  case $data in
    gs://*)
      say "copying $data"
      mkdir -p "$data_folder"
      gcloud storage rsync --recursive "$data" "$data_folder"
      ;;
  esac
  [ -d "$data_folder" ] || fail "no data in $data_folder: give DATA=gs://... or a folder to copy"
  say "ready"
}

start() {
  local workdir
  workdir=$(local_path "$1")
  huge_pages # a VM that was restarted has lost these, and the mount
  case $1 in gs://*) mount_bucket "$1" ;; esac
  shift 2
  if alive; then
    say "training runs already"
    return
  fi
  mkdir -p "$state" "$workdir"
  # Of an earlier, shorter run: whoever watches must not take it for this one's.
  rm -f "$state/exit" "$state/pid" "$workdir/finished.json"
  # Compiled programs beside the run: a VM made anew after a preemption starts at once.
  export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$workdir/xla_cache}
  setsid nohup bash "${BASH_SOURCE[0]}" run "$workdir" "$@" >>"$state/log" 2>&1 </dev/null &
  # Known from here on, however long the machine takes to begin with it.
  printf '%s\n' "$!" >"$state/waiter"
  while alive && ! [ -e "$state/pid" ]; do sleep 0.1; done
  say "training started; its log: $state/log"
}

# The background process: keeps the exit status for `status`.
run() {
  local workdir=$1
  shift
  cd "$code"
  "$code/.venv/bin/b2txt" train --workdir "$workdir" \
    --config.data.root="$data_folder" "$@" &
  local child=$! code_=0
  printf '%s\n' "$child" >"$state/pid.new"
  mv "$state/pid.new" "$state/pid"
  # A VM that shuts down tells every process; the training must not hear it from here once more: a
  # second signal interrupts its save. A trapped signal ends `wait` early: wait until the child is gone.
  trap : TERM INT
  while :; do
    code_=0
    wait "$child" || code_=$?
    kill -0 "$child" 2>/dev/null || break
  done
  # The exit status comes last: once it is there, the next training may start, and this process must
  # not touch what is then that one's.
  printf '%s\n' "$code_" >"$state/exit.new"
  rm -f "$state/pid"
  mv "$state/exit.new" "$state/exit"
}

# Whether the number in a state file is that of a running process with such a command. The command is
# compared too: after a restart of the VM the number may be another program's.
runs() {
  local words
  [ -e "$state/$1" ] || return 1
  words=$(tr '\0' ' ' 2>/dev/null <"/proc/$(cat "$state/$1")/cmdline") || return 1
  [[ $words =~ $2 ]]
}

# From `start` until the exit status is written. `start` itself counts: the process that it has begun
# is still a copy of it for a moment.
alive() {
  runs pid 'b2txt' || { ! [ -e "$state/exit" ] && runs waiter 'on_vm\.sh (start|run) '; }
}

status() {
  local workdir
  workdir=$(local_path "$1")
  if alive; then
    echo "b2txt-status: running"
  elif [ -e "$workdir/finished.json" ]; then
    echo "b2txt-status: finished"
  elif [ -e "$state/exit" ]; then
    echo "b2txt-status: exited $(cat "$state/exit")"
  elif [ -e "$state/pid" ]; then
    echo "b2txt-status: exited 137" # killed together with the process that waited for it
  else
    echo "b2txt-status: absent"
  fi
}

stop() {
  alive || return 0
  # Once only: a second signal interrupts the save. A training that has just been asked for has no
  # number yet.
  local told=no
  for _ in $(seq $((10 * ${STOP_SECONDS:-120}))); do
    alive || break
    if [ "$told" = no ] && [ -e "$state/pid" ]; then
      told=yes
      kill -TERM "$(cat "$state/pid")" 2>/dev/null || true
    fi
    sleep 0.1
  done
  for _ in $(seq 100); do
    alive || break
    kill -KILL "$(cat "$state/pid")" 2>/dev/null || true
    sleep 0.1
  done
  ! alive || fail "the training does not end, not even by SIGKILL: restart or delete this VM"
  say "stopped"
}

doctor() {
  local workdir
  workdir=$(local_path "$1")
  cd "$code"
  .venv/bin/b2txt doctor --workdir "$workdir" --data "$data_folder" "${@:2}"
}

log() {
  tail -n "${LINES_SHOWN:-40}" "$state/log" | tr '\r' '\n' | tail -n "${LINES_SHOWN:-40}"
}

command=${1:-}
case $command in
  setup | start | run | status | stop | doctor | log)
    shift
    "$command" "$@"
    ;;
  *) fail "found '$command'; needed setup, start, status, stop, doctor or log" ;;
esac
