#!/usr/bin/env bash
# Trains on Cloud TPU VMs: creates them, sets them up, trains, watches, fetches, deletes.
# `launch/tpu.sh --help` and docs/tpu.md say how. Runs on Linux and macOS (bash 3.2).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repository=$(dirname "$here")
dry_run=no
scratch=''
trap 'rm -rf "$scratch"' EXIT

usage() {
  cat <<'TEXT'
usage: launch/tpu.sh [--dry-run] [--env FILE] [--SETTING VALUE]... COMMAND [-- ARGUMENTS]

commands
  create    request the TPU (a queued resource) and wait until it is active
  setup     copy the code, install it, mount the bucket, fetch the data; on all workers
  train     start `b2txt train` in the background; on all workers
  watch     wait for the end; recreate a preempted TPU and continue the run
  up        create, setup, train, watch; continues where an earlier call stopped
  recreate  delete, create, setup, train: what `watch` does after a preemption
  status    state of the TPU and of the training
  doctor    `b2txt doctor` on all workers: problems and their remedies
  check-device
            `b2txt check-device` on all workers: does this TPU compute what it should, and how fast;
            -- --thorough for more; the first thing to run after `create` and `setup`
  log       the last lines of the training's log
  stop      make the training save and end; the TPU stays (and costs)
  fetch     copy the run's folder to this machine
  delete    delete the TPU; bucket and run stay

settings, as flags (--zone us-west4-a) or as lines ZONE=us-west4-a of the file given with --env;
there, a # at the start of a line or after a space begins a comment
  PROJECT          Google Cloud project
  ZONE             zone that has the accelerator
  NAME             name of the TPU and its queued resource
  ACCELERATOR      v4-8, v5litepod-8, v5p-8, v6e-8 ... (v4, v5p: cores; v5litepod, v6e: chips)
  WORKDIR          gs://BUCKET/FOLDER for the run; or a path on the VM (one VM, not spot)
  DATA             gs://BUCKET/FOLDER with the sessions, packed or not; or a folder of this machine
  CONFIG           configuration file in this repository, e.g. configs/nejm_baseline.py
  SPOT             yes: cheaper, may be preempted at any time; default no
  RUNTIME          software version of the VM; default: the one for ACCELERATOR
  SERVICE_ACCOUNT  of the VM; default: the project's
  NETWORK          default: default
  OUT              where `fetch` writes; default runs/NAME
  DELETE           yes: `watch` and `up` delete the TPU when the run is complete; default no
  POLL_SECONDS     between two looks at the TPU, more than 0; default 60
  RETRIES          crashes, failed set-ups or failed requests in a row before `watch` gives up;
                   default 3

ARGUMENTS go to `b2txt train`, e.g. -- --config.train.steps=1000; give them to train, watch, up and
doctor alike. --dry-run prints the commands, one per line, quoted for a shell, and runs nothing.
TEXT
}

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}
say() { [ "$dry_run" = yes ] || printf '%s %s\n' "$(date +%H:%M:%S)" "$*" >&2; }

# ---------------------------------------------------------------------------------- settings

settings='PROJECT ZONE NAME ACCELERATOR WORKDIR DATA CONFIG SPOT RUNTIME SERVICE_ACCOUNT NETWORK OUT
DELETE POLL_SECONDS RETRIES'
PROJECT='' ZONE='' NAME='' ACCELERATOR='' WORKDIR='' DATA='' CONFIG='' RUNTIME='' SERVICE_ACCOUNT=''
OUT='' SPOT=no DELETE=no NETWORK=default POLL_SECONDS=60 RETRIES=3

set_value() { # NAME VALUE WHERE
  local known
  for known in $settings; do
    if [ "$known" = "$1" ]; then
      printf -v "$1" '%s' "$2"
      return
    fi
  done
  fail "$3: unknown setting '$1'; known: $(printf '%s' "$settings" | tr '\n' ' ')"
}

trimmed() { # without spaces, and the \r of Windows, at both ends
  local text=$1
  text=${text#"${text%%[![:space:]]*}"}
  printf '%s' "${text%"${text##*[![:space:]]}"}"
}

read_env() { # read, not run: a settings file is data
  local line value number=0
  [ -f "$1" ] || fail "settings file $1 does not exist; start from launch/example.env"
  while IFS= read -r line || [ -n "$line" ]; do
    number=$((number + 1))
    line=$(trimmed "${line%%[[:space:]]#*}")
    case $line in '' | '#'*) continue ;; esac
    case $line in *=*) ;; *) fail "$1, line $number: found '$line'; needed NAME=VALUE" ;; esac
    value=$(trimmed "${line#*=}")
    case $value in
      \"*\" | \'*\') fail "$1, line $number: found $line; needed the value without quotes" ;;
    esac
    set_value "$(trimmed "${line%%=*}")" "$value" "$1, line $number"
  done <"$1"
}

need() { # SETTING...
  local name missing=''
  for name in "$@"; do
    [ -n "${!name}" ] || missing="$missing $name"
  done
  [ -z "$missing" ] ||
    fail "not set:$missing; give them as flags (--zone ...) or in a file with --env (launch/example.env)"
}

# Hosts and software by accelerator type: https://cloud.google.com/tpu/docs/runtimes
pod=no
check_settings() {
  need PROJECT ZONE NAME ACCELERATOR
  local size=${ACCELERATOR##*-} runtime
  case $ACCELERATOR in
    tpu7x-*)
      fail "ACCELERATOR is $ACCELERATOR; Google offers TPU7x through Kubernetes Engine only," \
        "which this script does not drive: docs/tpu.md" ;;
    v4-*) runtime=tpu-ubuntu2204-base ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    *) fail "ACCELERATOR is '$ACCELERATOR'; needed v4-N, v5litepod-N, v5p-N or v6e-N" ;;
  esac
  case $size in '' | *[!0-9]*) fail "ACCELERATOR is '$ACCELERATOR'; needed a number after the -" ;; esac
  [ "$size" -le 8 ] || pod=yes
  RUNTIME=${RUNTIME:-$runtime}
  OUT=${OUT:-runs/$NAME}
  case $SPOT in yes | no) ;; *) fail "SPOT is '$SPOT'; needed yes or no" ;; esac
  case $DELETE in yes | no) ;; *) fail "DELETE is '$DELETE'; needed yes or no" ;; esac
  case $RETRIES in '' | *[!0-9]*) fail "RETRIES is '$RETRIES'; needed a number" ;; esac
  case $POLL_SECONDS in
    *[!0-9.]* | *.*.* | *. | .*) ;;
    *[1-9]*) return 0 ;;
  esac
  fail "POLL_SECONDS is '$POLL_SECONDS'; needed a number above 0, such as 60"
}

check_workdir() {
  need WORKDIR
  case $WORKDIR in
    gs://*/?*) ;;
    gs://*) fail "WORKDIR is $WORKDIR; needed a folder in the bucket: gs://BUCKET/FOLDER" ;;
    /*)
      [ "$SPOT" = no ] ||
        fail "WORKDIR is $WORKDIR, on the VM's disk, which is lost when a spot VM is preempted;" \
          "needed gs://BUCKET/FOLDER with SPOT=yes"
      [ "$pod" = no ] ||
        fail "WORKDIR is $WORKDIR, on each VM's own disk, but the workers of $ACCELERATOR write one" \
          "checkpoint together; needed gs://BUCKET/FOLDER"
      ;;
    *) fail "WORKDIR is $WORKDIR; needed gs://BUCKET/FOLDER or a path on the VM that starts with /" ;;
  esac
}

check_training() {
  need WORKDIR DATA CONFIG
  check_workdir
  case $CONFIG in
    "$repository"/*) CONFIG=${CONFIG#"$repository"/} ;;
    /*) fail "CONFIG is $CONFIG; needed a file inside $repository: it travels with the code" ;;
  esac
  [ -f "$repository/$CONFIG" ] || fail "CONFIG: there is no file $repository/$CONFIG"
  case $DATA in
    gs://*/?*) ;;
    *) [ -d "$DATA" ] || fail "DATA: there is no folder $DATA; needed gs://BUCKET/FOLDER or a folder" ;;
  esac
}

# Print the number of a configuration key: from the arguments, the configuration file, or the files
# that it builds on. Print nothing if it is no plain number there. `b2txt train` checks it anyway.
configured() { # SECTION.KEY
  local word file names value='' key=config.$1
  # shellcheck disable=SC2013 # file names without spaces
  for file in $(grep -oE '[A-Za-z0-9_]+\.py' "$repository/$CONFIG" || true) "${CONFIG##*/}"; do
    names=$repository/$(dirname "$CONFIG")/$file
    [ -f "$names" ] || continue
    word=$(sed -n "s/^ *$key *= *\([^#]*\).*/\1/p" "$names" | tail -n 1)
    [ -z "$word" ] || value=$(trimmed "$word")
  done
  for word in ${train_arguments[@]+"${train_arguments[@]}"}; do
    case $word in "--$key="*) value=${word#*=} ;; esac
  done
  case $value in *[!0-9]* | 0) ;; *) printf '%s' "$value" ;; esac
}

check_rows() { # fail or warn
  local devices=$((10#${ACCELERATOR##*-})) days trials held model needed
  case $ACCELERATOR in v4-* | v5p-*) devices=$((devices / 2)) ;; esac # counted in cores
  days=$(configured data.days_per_batch) trials=$(configured data.trials_per_day)
  held=$(configured data.eval_batch_size) model=$(configured parallel.model_axis)
  [ -n "$days" ] && [ -n "$trials" ] && [ -n "$held" ] && [ -n "$model" ] || return 0
  [ "$devices" -gt 0 ] && [ $((devices % model)) = 0 ] || return 0
  local shares=$((devices / model))
  [ $((days * trials % shares)) != 0 ] || [ $((held % shares)) != 0 ] || return 0
  needed=$trials
  while [ $((days * needed % shares)) != 0 ]; do needed=$((needed + 1)); done
  "$1" "a batch has $((days * trials)) rows (data.days_per_batch * data.trials_per_day) and one of" \
    "validation $held (data.eval_batch_size), which $shares devices of $ACCELERATOR cannot share" \
    "evenly; needed a smaller ACCELERATOR, or larger batches, at the end of the command:" \
    "-- --config.data.trials_per_day=$needed" \
    "--config.data.eval_batch_size=$(((held + shares - 1) / shares * shares))." \
    "Larger batches are another recipe: the learning rates are for those of the configuration"
}
warn() { printf 'warning: %s\n' "$*" >&2; }

# ---------------------------------------------------------------------------------- commands

show() {
  local line
  line=$(printf '%q ' "$@")
  printf '%s\n' "${line% }"
}
run() {
  if [ "$dry_run" = yes ]; then show "$@"; else "$@"; fi
}
# Print the answer of a command. In a dry run, list the command and print the first argument.
ask() { # DRY_ANSWER COMMAND...
  local dry=$1 answer errors status=0
  shift
  if [ "$dry_run" = yes ]; then
    show "$@" >&3
    printf '%s' "$dry"
    return
  fi
  errors=$(mktemp)
  answer=$("$@" 2>"$errors") || status=$?
  if [ "$status" = 0 ]; then
    printf '%s' "$answer"
  elif grep -qiE 'not[_ ]found|matched no objects|404' "$errors"; then
    printf NONE
  else
    sed 's/^/  /' "$errors" >&2
    printf UNKNOWN
  fi
  rm -f "$errors"
}

place=()
queued() { run gcloud compute tpus queued-resources "$1" "$NAME" "${place[@]}" "${@:2}"; }
queued_state() {
  ask "${1:-ACTIVE}" gcloud compute tpus queued-resources describe "$NAME" "${place[@]}" \
    '--format=value(state.state)'
}
node_state() {
  ask READY gcloud compute tpus tpu-vm describe "$NAME" "${place[@]}" '--format=value(state)'
}
on_workers() { # WORKER REMOTE_WORD...
  local worker=$1 words
  words=$(printf '%q ' "${@:2}")
  run gcloud compute tpus tpu-vm ssh "$NAME" "${place[@]}" --worker="$worker" --quiet \
    --command="bash b2txt_jax/launch/on_vm.sh ${words% }"
}
copy_to_workers() { # LOCAL REMOTE
  run gcloud compute tpus tpu-vm scp --recurse "$1" "$NAME:$2" "${place[@]}" --worker=all --quiet
}

create() {
  local more=()
  [ "$SPOT" = no ] || more+=(--spot)
  [ -z "$SERVICE_ACCOUNT" ] || more+=("--service-account=$SERVICE_ACCOUNT")
  queued create --node-id="$NAME" --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" \
    --network="$NETWORK" --scopes=https://www.googleapis.com/auth/cloud-platform --quiet \
    ${more[@]+"${more[@]}"} || return 1
  wait_active
}

wait_active() {
  local state before='' unknown=0
  while :; do
    state=$(queued_state)
    [ "$state" = "$before" ] || say "$NAME: $state"
    before=$state
    case $state in
      ACTIVE) return 0 ;;
      FAILED | SUSPENDED | NONE) return 1 ;;
      UNKNOWN)
        unknown=$((unknown + 1))
        [ "$unknown" -le "$RETRIES" ] || return 1
        ;;
      *) unknown=0 ;;
    esac
    sleep "$POLL_SECONDS"
  done
}

# Renaming a folder must be atomic. Otherwise a partly renamed checkpoint looks complete.
check_bucket() {
  case $WORKDIR in gs://*) ;; *) return 0 ;; esac
  local bucket=${WORKDIR#gs://} answer
  bucket=gs://${bucket%%/*}
  answer=$(ask True gcloud storage buckets describe "$bucket" --project="$PROJECT" \
    '--format=value(hierarchical_namespace.enabled)')
  case $answer in
    True) ;;
    UNKNOWN) fail "$bucket could not be looked at: see the message above" ;;
    NONE) fail "there is no bucket $bucket; docs/tpu.md says how to make it" ;;
    *)
      fail "$bucket has no hierarchical namespace, so that its folders cannot be renamed in one step" \
        "and a checkpoint cut off by a preemption could look whole. Make one with: gcloud storage" \
        "buckets create gs://OTHER --project=$PROJECT --location=${ZONE%-*}" \
        "--uniform-bucket-level-access --enable-hierarchical-namespace"
      ;;
  esac
}

setup() {
  check_bucket
  local archive=/tmp/b2txt_jax.tar.gz
  if [ "$dry_run" = no ]; then
    scratch=${scratch:-$(mktemp -d)}
    archive=$scratch/b2txt_jax.tar.gz
  fi
  # Pack the files on the disk, committed or not, without caches, data and runs.
  run tar -czf "$archive" -C "$repository" --exclude=__pycache__ setup.cfg setup.py pyproject.toml \
    constraints.txt README.md LICENSE b2txt_jax lm_server configs launch || return 1
  copy_to_workers "$archive" b2txt_jax.tar.gz || return 1
  local words remote_data=''
  case $DATA in
    gs://*) remote_data=$DATA ;;
    *) # scp would copy into a folder left by an earlier copy.
      run gcloud compute tpus tpu-vm ssh "$NAME" "${place[@]}" --worker=all --quiet \
        --command='rm -rf b2txt_data' || return 1
      copy_to_workers "$DATA" b2txt_data || return 1
      ;;
  esac
  words=$(printf '%q ' "$WORKDIR" "$remote_data")
  run gcloud compute tpus tpu-vm ssh "$NAME" "${place[@]}" --worker=all --quiet \
    --command="mkdir -p b2txt_jax && tar -xzf b2txt_jax.tar.gz -C b2txt_jax && bash b2txt_jax/launch/on_vm.sh setup ${words% }" ||
    return 1
}

train_arguments=()
train() {
  local words=(start "$WORKDIR" "$DATA" --config "$CONFIG")
  # On a slice every worker runs the same program and discovers the others.
  [ "$pod" = no ] || words+=(--distributed)
  on_workers all "${words[@]}" ${train_arguments[@]+"${train_arguments[@]}"}
}

remove() { queued delete --force --quiet; }

recreate() {
  if [ "$(queued_state SUSPENDED)" != NONE ]; then remove || return 1; fi
  create && setup && train
}

# Reduce one line per worker to finished, running, absent, saved, "broken N" or "crashed N".
training_state() {
  local answer codes script=b2txt_jax/launch/on_vm.sh
  # Without the script, the VM is not set up yet.
  answer=$(ask "b2txt-status: running" gcloud compute tpus tpu-vm ssh "$NAME" "${place[@]}" \
    --worker=all --quiet --command="if [ -e $script ]; then bash $script status $(
      printf '%q' "$WORKDIR"
    ); else echo b2txt-status: absent; fi")
  [ "$answer" != NONE ] || answer=UNKNOWN
  codes=$(printf '%s\n' "$answer" | tr -d '\r' | sed -n 's/.*b2txt-status: exited //p' | sort -u)
  case $answer in
    UNKNOWN) echo UNKNOWN ;;
    *'b2txt-status: finished'*) echo finished ;;
    *) # A worker that ends takes the others down, so its status counts.
      if printf '%s\n' "$codes" | grep -qvxE '0|2|130|143|'; then
        echo "crashed $(printf '%s\n' "$codes" | grep -vxE '0|2|130|143|' | head -n 1)"
      elif printf '%s\n' "$codes" | grep -qx 2; then
        echo 'broken 2'
      elif [ -n "$codes" ]; then
        echo saved
      elif printf '%s' "$answer" | grep -q 'b2txt-status: absent'; then
        echo absent
      elif printf '%s' "$answer" | grep -q 'b2txt-status: running'; then
        echo running
      else
        echo UNKNOWN
      fi
      ;;
  esac
}

# `b2txt train` exits with 0 when complete and after a save on SIGTERM. Only the file distinguishes.
complete() {
  case $WORKDIR in gs://*) ;; *) return 1 ;; esac
  case $(ask NONE gcloud storage ls "$WORKDIR/finished.json" --project="$PROJECT") in
    NONE | UNKNOWN) return 1 ;;
  esac
}

watch() {
  local state training before='' failures=0 crashes=0 stops=0
  while :; do
    if complete; then
      finish
      return
    fi
    state=$(queued_state)
    [ "$state" != ACTIVE ] || state=$(node_state)
    training=''
    [ "$state" != READY ] || training=$(training_state)
    if [ "$dry_run" = yes ]; then
      echo "# when training crashed, or ended by a signal:"
      on_workers all stop
      train
      if [ "$SPOT" = yes ]; then
        echo "# when it was preempted (SUSPENDED, FAILED or PREEMPTED):"
        recreate
      fi
      if [ "$DELETE" = yes ]; then
        echo "# when the run is complete:"
        finish
      fi
      return 0
    fi
    [ "$state $training" = "$before" ] || say "$NAME: $state${training:+, training $training}"
    before="$state $training"
    case "$state $training" in
      'READY finished')
        finish
        return
        ;;
      'READY running') failures=0 stops=0 ;;
      'READY saved') # stopped by a signal, and the VM is still there
        stops=$((stops + 1))
        if [ "$stops" -gt "$RETRIES" ]; then
          on_workers 0 log || true
          fail "training ended $stops times at once, without an error and without completing the" \
            "run: see its log above"
        fi
        { on_workers all stop && train; } || failures=$((failures + 1))
        ;;
      'READY absent') { setup && train; } || failures=$((failures + 1)) ;;
      'READY broken'*)
        on_workers 0 log || true
        fail "training ended with an error that trying again does not mend: see its log above"
        ;;
      'READY crashed'*)
        on_workers 0 log || true
        crashes=$((crashes + 1))
        if [ "$crashes" -gt "$RETRIES" ]; then
          fail "training crashed $crashes times ($training): see its log above"
        fi
        say "training $training: stopping all workers and going on from the last checkpoint"
        { on_workers all stop && train; } || failures=$((failures + 1))
        ;;
      'SUSPENDED '* | 'FAILED '* | 'PREEMPTED '* | 'TERMINATED '* | 'STOPPED '*)
        if [ "$SPOT" = no ]; then
          fail "$NAME is $state, and it is not a spot TPU: look at 'gcloud compute tpus" \
            "queued-resources describe $NAME --zone=$ZONE --project=$PROJECT', then run" \
            "launch/tpu.sh recreate"
        fi
        say "$NAME is $state: making it anew; the run goes on from its last checkpoint"
        if recreate; then failures=0 crashes=0; else failures=$((failures + 1)); fi
        before=''
        ;;
      'NONE '*) fail "there is no TPU $NAME in $ZONE: create it with launch/tpu.sh up" ;;
      *UNKNOWN*) failures=$((failures + 1)) ;;
      *) ;; # in transition: WAITING_FOR_RESOURCES, PROVISIONING, SUSPENDING, REPAIRING ...
    esac
    if [ "$failures" -gt "$RETRIES" ]; then
      fail "$failures failures in a row with $NAME ($state): see the messages above. Nothing was" \
        "deleted: 'launch/tpu.sh delete' ends the costs"
    fi
    sleep "$POLL_SECONDS"
  done
}

finish() {
  say "the run is complete: $WORKDIR"
  if [ "$DELETE" = yes ]; then
    case $WORKDIR in
      gs://*) ;;
      *) fetch || fail "$NAME was not deleted: the run on it could not be fetched" ;;
    esac
    remove || fail "$NAME could not be deleted, and costs: see the message above"
  else
    say "$NAME still runs and costs: launch/tpu.sh fetch, then launch/tpu.sh delete"
  fi
}

doctor() {
  local words=(doctor "$WORKDIR" --config "$CONFIG") word
  for word in ${train_arguments[@]+"${train_arguments[@]}"}; do
    case $word in --config.*) words+=("$word") ;; esac
  done
  on_workers all "${words[@]}"
}

check_device() { on_workers all check-device "$WORKDIR" ${train_arguments[@]+"${train_arguments[@]}"}; }

up() {
  case $(queued_state NONE) in
    NONE)
      if ! { create && setup && train; }; then
        say "$NAME was not set up at the first attempt: see the messages above"
      fi
      ;;
    UNKNOWN) fail "the state of $NAME is not known: see the message above" ;;
    *) say "$NAME is there already: going on with it" ;;
  esac
  watch
}

fetch() {
  case $WORKDIR in
    gs://*)
      run mkdir -p "$OUT"
      run gcloud storage rsync --recursive '--exclude=^xla_cache/' "$WORKDIR" "$OUT"
      ;;
    *)
      # scp would nest the run inside an existing folder.
      local target=$OUT number=1
      while [ -e "$target" ]; do
        number=$((number + 1))
        target=$OUT.$number
      done
      run mkdir -p "$(dirname "$OUT")"
      run gcloud compute tpus tpu-vm scp --recurse "$NAME:$WORKDIR" "$target" "${place[@]}" \
        --worker=0 --quiet || return 1
      say "the run is in $target"
      ;;
  esac
}

tell() { [ "$dry_run" = yes ] || echo "$*"; }
status() {
  local state
  state=$(queued_state)
  tell "queued resource: $state"
  [ "$state" = ACTIVE ] || return 0
  state=$(node_state)
  tell "TPU VM: $state"
  [ "$state" = READY ] || return 0
  state=$(training_state)
  tell "training: $state"
}

# ---------------------------------------------------------------------------------- start

command=''
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help)
      usage
      exit 0
      ;;
    --dry-run) dry_run=yes ;;
    --)
      shift
      train_arguments=("$@")
      break
      ;;
    --*=*)
      name=${1%%=*}
      value=${1#*=}
      set -- "$name" "$value" "${@:2}"
      continue
      ;;
    --env)
      [ $# -gt 1 ] || fail "--env needs a file"
      read_env "$2"
      shift
      ;;
    --*)
      [ $# -gt 1 ] || fail "$1 needs a value"
      set_value "$(printf '%s' "${1#--}" | tr 'a-z-' 'A-Z_')" "$2" "$1"
      shift
      ;;
    *)
      [ -z "$command" ] || fail "found two commands, $command and $1; needed one"
      command=$1
      ;;
  esac
  shift
done

case $command in
  create)
    check_settings
    # Costs begin here.
    if [ -n "$CONFIG" ] && [ -f "$repository/${CONFIG#"$repository"/}" ]; then
      CONFIG=${CONFIG#"$repository"/}
      check_rows warn
    fi
    ;;
  delete | stop | log) check_settings ;;
  status)
    check_settings
    need WORKDIR
    ;;
  fetch | check-device)
    check_settings
    check_workdir
    ;;
  setup | doctor)
    check_settings
    check_training
    ;;
  train | watch | up | recreate)
    check_settings
    check_training
    check_rows fail
    ;;
  '')
    usage >&2
    fail "no command given"
    ;;
  *) fail "unknown command '$command'; launch/tpu.sh --help lists them" ;;
esac
place=("--zone=$ZONE" "--project=$PROJECT")

start() {
  case $command in
    create) create || fail "$NAME did not become ACTIVE: see above; launch/tpu.sh delete removes it" ;;
    delete) remove ;;
    stop) on_workers all stop ;;
    log) on_workers 0 log ;;
    check-device) check_device ;;
    setup | train | recreate) "$command" || fail "$command of $NAME failed: see the messages above" ;;
    *) "$command" ;;
  esac
}

if [ "$dry_run" = yes ]; then
  # Print everything at once, so that a reader of the first line only cannot stop the script halfway.
  # Commands of `ask` are listed through descriptor 3, because its standard output is the answer.
  ended=0
  listed=$(exec 3>&1 && start) || ended=$?
  [ -z "$listed" ] || printf '%s\n' "$listed"
  exit "$ended"
fi
start
