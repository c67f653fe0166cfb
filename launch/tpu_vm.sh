#!/usr/bin/env bash
# Trains on a Cloud TPU slice: asks for it as a queued resource, installs this checkout on all of its hosts, starts the
# run there and leaves it running. Written for v5p and v6e slices.
#
#     export PROJECT=… ZONE=… NFS=ADDRESS:/SHARE
#     launch/tpu_vm.sh --config=configs/streamo.py:7b --workdir=/mnt/runs/streamo
#     launch/tpu_vm.sh --delete
#
# All hosts of a slice write parts of one checkpoint, so --workdir must lie on a file system that they share: NFS is
# mounted at /mnt/runs on each (a Filestore instance in the slice's network, for one). The same command goes on with a
# run whose slice was preempted, in a new slice. Needs gcloud, logged in.

set -euo pipefail

NAME=${NAME:-jstream}                 # of the slice and of its request
ACCELERATOR=${ACCELERATOR:-v5p-128}   # v5p counts cores: 64 chips, 16 hosts. v6e counts chips
RUNTIME=${RUNTIME:-v2-alpha-tpuv5}    # v2-alpha-tpuv6e for v6e
SPOT=${SPOT:-}                        # anything: cheaper, and may be taken away
PROJECT=${PROJECT:?expected the Google Cloud project}
ZONE=${ZONE:?expected a zone that has such slices}

at=(--project="$PROJECT" --zone="$ZONE")

state() {
  gcloud compute tpus queued-resources describe "$NAME" "${at[@]}" --format='value(state.state)' 2>/dev/null || true
}

delete() {
  gcloud compute tpus queued-resources delete "$NAME" "${at[@]}" --force --quiet
}

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$NAME" "${at[@]}" --worker=all --command="$1"
}

if [ "${1:-}" = --delete ]; then
  delete
  exit
fi

NFS=${NFS:?expected ADDRESS:/SHARE of the file system for --workdir}
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# ------------------------------------------------------------------------------------------------------------ a slice
case $(state) in
  SUSPEND* | FAILED) delete ;;  # a slice that was taken away; its request does not come back to life
esac
if [ -z "$(state)" ]; then
  gcloud compute tpus queued-resources create "$NAME" "${at[@]}" --node-id="$NAME" \
    --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" ${SPOT:+--spot}
fi
until [ "$(state)" = ACTIVE ]; do
  echo "waiting for $ACCELERATOR: $(state)"
  case $(state) in SUSPEND* | FAILED) exit 1 ;; esac
  sleep 30
done

# ---------------------------------------------------------------------------------------------------- jstream on it
archive=$(mktemp)
trap 'rm -f "$archive"' EXIT
git ls-files -z --cached --others --exclude-standard | tar --null --files-from=- -czf "$archive"
gcloud compute tpus tpu-vm scp "$archive" "$NAME:jstream.tar.gz" "${at[@]}" --worker=all
on_all_hosts "
  set -e
  if [ -e jstream.pid ] && kill -0 \$(cat jstream.pid) 2>/dev/null; then echo 'a run is going on here' >&2; exit 1; fi
  mkdir -p jstream && tar -xzf jstream.tar.gz -C jstream
  python3 -m pip install -q --user uv  # the runtime's own Python may be older than jstream needs
  [ -e jstream/.venv ] || python3 -m uv venv -q --python 3.12 jstream/.venv
  python3 -m uv pip install -q --python jstream/.venv/bin/python -e 'jstream[tpu,hub]'
  command -v mount.nfs >/dev/null || { sudo apt-get update -q && sudo apt-get install -qy nfs-common; }
  sudo mkdir -p /mnt/runs
  mountpoint -q /mnt/runs || sudo mount -t nfs '$NFS' /mnt/runs
"

# ------------------------------------------------------------------------------------------------------------ the run
# A session of its own, so that it outlives the connection. JAX finds the other hosts by the machine's metadata.
printf -v arguments ' %q' "$@"
on_all_hosts "
  cd jstream
  setsid nohup .venv/bin/python -m jstream.train --distributed$arguments >>../jstream.log 2>&1 </dev/null &
  echo \$! >../jstream.pid
"

ssh="gcloud compute tpus tpu-vm ssh $NAME ${at[*]}"
cat <<END
The run has been started on all hosts of $NAME.
  watch it    $ssh --worker=0 --command='tail -F jstream.log'
  stop it     $ssh --worker=all --command='kill \$(cat jstream.pid)'     # it saves first
  go on       the same command as now, also after the slice was preempted
  give back   launch/tpu_vm.sh --delete                                 # a slice costs money until then
END
