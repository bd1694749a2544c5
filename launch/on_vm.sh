#!/usr/bin/env bash
# The part of `tpu.sh` that runs on every TPU VM. `tpu.sh` copies and calls it.
#
#   on_vm.sh setup  WORKDIR DATA          huge pages, bucket, Python, packages, data
#   on_vm.sh start  WORKDIR DATA ARG...   `b2txt train` in the background, outlives the ssh session
#   on_vm.sh status WORKDIR               b2txt-status: finished | running | exited N | absent
#   on_vm.sh stop                         SIGTERM: the step ends, the state is saved
#   on_vm.sh doctor WORKDIR ARG...        `b2txt doctor`
#   on_vm.sh check-device WORKDIR ARG...  `b2txt check-device`, figures in WORKDIR/check_device_HOST.json
#   on_vm.sh log                          the last lines of the training's output
#
# WORKDIR: gs://BUCKET/FOLDER or a folder of this machine. DATA: gs://BUCKET/FOLDER, or empty if it
# was copied to ~/b2txt_data.
set -euo pipefail

code=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
data_folder=$HOME/b2txt_data
mount_point=$HOME/b2txt_bucket
state=$HOME/.b2txt_train
python_version=3.11 # the version of constraints.txt; TPU images have an older Python

say() { printf '%s: %s\n' "$(hostname)" "$*"; }
fail() {
  printf '%s: error: %s\n' "$(hostname)" "$*" >&2
  exit 2
}

# Print the path of gs://BUCKET/FOLDER in the mounted bucket.
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
    # Automatic updates of a fresh VM may hold the lock.
    sudo apt-get -o DPkg::Lock::Timeout=600 -qq update
    sudo apt-get -o DPkg::Lock::Timeout=600 -qq install -y gcsfuse
  fi
  mkdir -p "$mount_point"
  if ! mountpoint -q "$mount_point"; then
    # No metadata cache: all workers share one folder and must see each other's files at once.
    gcsfuse --metadata-cache-ttl-secs=0 "$bucket" "$mount_point"
  fi
}

python_environment() {
  cd "$code"
  if ! command -v uv >/dev/null; then
    export PATH=$HOME/.local/bin:$PATH
    command -v uv >/dev/null || python3 -m pip install --quiet --user uv ||
      curl -LsSf https://astral.sh/uv/install.sh | sh # if pip may not install for a user
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
  huge_pages # a restart of the VM resets these and the mount
  case $1 in gs://*) mount_bucket "$1" ;; esac
  shift 2
  if alive; then
    say "training runs already"
    return
  fi
  mkdir -p "$state" "$workdir"
  # Files of an earlier, shorter run must not be taken for this one's.
  rm -f "$state/exit" "$state/pid" "$workdir/finished.json"
  # Keep compiled programs beside the run, so that a new VM after a preemption starts at once.
  export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$workdir/xla_cache}
  setsid nohup bash "${BASH_SOURCE[0]}" run "$workdir" "$@" >>"$state/log" 2>&1 </dev/null &
  # `alive` is true from here on, even if the machine starts the process late.
  printf '%s\n' "$!" >"$state/waiter"
  while alive && ! [ -e "$state/pid" ]; do sleep 0.1; done
  say "training started; its log: $state/log"
}

# The background process, which stores the exit status for `status`.
run() {
  local workdir=$1
  shift
  cd "$code"
  "$code/.venv/bin/b2txt" train --workdir "$workdir" \
    --config.data.root="$data_folder" "$@" &
  local child=$! code_=0
  printf '%s\n' "$child" >"$state/pid.new"
  mv "$state/pid.new" "$state/pid"
  # A VM that shuts down signals every process. Do not forward the signal: a second one interrupts
  # the training's save. A trapped signal ends `wait` early, so wait until the child has ended.
  trap : TERM INT
  while :; do
    code_=0
    wait "$child" || code_=$?
    kill -0 "$child" 2>/dev/null || break
  done
  # Write the exit status last. Once it exists, the next training may start, whose files this process
  # must not touch.
  printf '%s\n' "$code_" >"$state/exit.new"
  rm -f "$state/pid"
  mv "$state/exit.new" "$state/exit"
}

# Test whether the process id in a state file belongs to a running process with this command. After
# a restart of the VM the id may belong to another program.
runs() {
  local words
  [ -e "$state/$1" ] || return 1
  words=$(tr '\0' ' ' 2>/dev/null <"/proc/$(cat "$state/$1")/cmdline") || return 1
  [[ $words =~ $2 ]]
}

# True from `start` until the exit status is written. `start` itself counts, because its background
# process is a copy of it for a moment.
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
  # Signal only once: a second signal interrupts the save. A training that has just been started has
  # no process id yet.
  local signalled=no
  for _ in $(seq $((10 * ${STOP_SECONDS:-120}))); do
    alive || break
    if [ "$signalled" = no ] && [ -e "$state/pid" ]; then
      signalled=yes
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

check_device() {
  local workdir
  case $1 in gs://*) mount_bucket "$1" ;; esac
  workdir=$(local_path "$1")
  mkdir -p "$workdir"
  cd "$code"
  .venv/bin/b2txt check-device --json "$workdir/check_device_$(hostname).json" "${@:2}"
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
  check-device)
    shift
    check_device "$@"
    ;;
  *) fail "found '$command'; needed setup, start, status, stop, doctor, check-device or log" ;;
esac
