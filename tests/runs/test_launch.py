"""Launching: processes that live and die together, and scripts and manifests that ask for what the machines have."""

import fcntl
import math
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import yaml

LAUNCH = pathlib.Path(__file__).resolve().parent.parent.parent / "launch"

# What all dummies begin with: a lock that is held for as long as they live says that they do.
HEAD = """
import fcntl, os, pathlib, signal, sys, time
number = int(os.environ["JAX_PROCESS_ID"])
lock = open(f"{number}.lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX)
"""
COLLECTIVE = """
import jax
jax.distributed.initialize(num_processes=int(os.environ["JAX_NUM_PROCESSES"]), process_id=number)
from jax.sharding import NamedSharding, PartitionSpec
mesh = jax.make_mesh((jax.device_count(),), ("data",))
mine = jax.numpy.array([10.0 ** number] * jax.local_device_count())
parts = jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec("data")), mine)
total = jax.jit(jax.numpy.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))(parts)
print(jax.process_index(), jax.process_count(), jax.local_device_count(), jax.device_count(), float(total))
print(sys.argv[1:], flush=True)
"""


@pytest.fixture
def launch(tmp_path):
    """Starts the launcher on two processes of a module with this body, in a folder of its own."""
    started = []

    def start(body: str, *options: str, arguments: tuple[str, ...] = ()) -> subprocess.Popen:
        (tmp_path / "dummy.py").write_text(HEAD + body)
        command = [sys.executable, LAUNCH / "local.py", "--module=dummy", *options, "--", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, cwd=tmp_path, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def lives(folder: pathlib.Path, number: int) -> bool:
    path = folder / f"{number}.lock"
    if not path.exists():
        return False
    with path.open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def both_live(folder: pathlib.Path) -> bool:
    return lives(folder, 0) and lives(folder, 1)


def none_lives(folder: pathlib.Path) -> bool:
    return not lives(folder, 0) and not lives(folder, 1)


# ----------------------------------------------------------------------------------------------------------- local.py


def test_processes_compute_on_the_devices_of_all_and_only_the_first_is_heard(launch):
    run = launch(COLLECTIVE, "--devices=2", arguments=("--config=tiny.py", "--", "--workdir=runs"))
    out, err = run.communicate(timeout=120)
    assert run.returncode == 0, err
    assert out.splitlines()[-2:] == ["0 2 2 4 22.0", "['--distributed', '--config=tiny.py', '--', '--workdir=runs']"]
    assert "1 2 2 4" not in out + err


def test_when_one_dies_all_end_and_its_last_words_are_shown(launch, tmp_path):
    run = launch("print('words of', number, flush=True)\nif number: sys.exit(7)\ntime.sleep(60)")
    out, err = run.communicate(timeout=60)
    assert run.returncode == 7
    assert none_lives(tmp_path)
    assert out == "words of 0\n"
    assert err.splitlines() == ["process 1 of 2 ended with 7", "[1] words of 1"]


def test_one_that_ignores_sigterm_as_jax_does_is_killed_after_a_grace_period(launch, tmp_path):
    body = """
if number == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    pathlib.Path("ready").touch()
    time.sleep(60)
while not os.path.exists("ready"): time.sleep(0.01)
os.kill(os.getpid(), signal.SIGKILL)
"""
    run = launch(body)
    run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGKILL
    assert none_lives(tmp_path)


def test_after_a_failure_all_are_started_again_so_many_times(launch, tmp_path):
    body = """
count = pathlib.Path(f"{number}.count")
count.write_text(str(int(count.read_text()) + 1 if count.exists() else 1))
if number == 1 and int(count.read_text()) < 3: sys.exit(9)
while int(pathlib.Path("1.count").read_text() or 0) < 3: time.sleep(0.01)
"""
    (tmp_path / "1.count").write_text("0")
    run = launch(body, "--restarts=1")
    _, err = run.communicate(timeout=60)
    assert run.returncode == 9
    assert err.count("starting all again") == 1 and "restart 1 of at most 1" in err
    (tmp_path / "1.count").write_text("1")
    run = launch(body, "--restarts=1")
    _, err = run.communicate(timeout=60)
    assert run.returncode == 0, err
    assert (tmp_path / "1.count").read_text() == "3"


def test_a_signal_is_passed_on_and_waited_for(launch, tmp_path):
    body = """
def save(*_):
    time.sleep(0.2 * (1 + number))
    pathlib.Path(f"{number}.saved").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
pathlib.Path(f"{number}.ready").touch()
time.sleep(60)
"""
    run = launch(body, "--restarts=5")
    wait_for(lambda: all((tmp_path / f"{number}.ready").exists() for number in range(2)))
    run.send_signal(signal.SIGTERM)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 143
    assert all((tmp_path / f"{number}.saved").exists() for number in range(2))
    assert "starting all again" not in err


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends the children of whoever was killed")
@pytest.mark.may_skip("other systems have nothing like it")
def test_no_process_outlives_a_launcher_that_is_killed(launch, tmp_path):
    run = launch("signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)")
    wait_for(lambda: both_live(tmp_path))
    run.kill()
    wait_for(lambda: none_lives(tmp_path))


@pytest.mark.parametrize("option", ["--processes=0", "--devices=0", "--restarts=-1"])
def test_numbers_that_make_no_sense_are_refused(launch, option):
    run = launch("", option)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 2 and "expected --processes and --devices ≥ 1" in err


# ------------------------------------------------------------------------------------------------ clusters and clouds


@pytest.mark.parametrize("script", ["slurm.sh", "tpu_vm.sh"])
def test_scripts_are_bash(script):
    subprocess.run(["bash", "-n", LAUNCH / script], check=True)
    assert os.access(LAUNCH / script, os.X_OK)


def test_slurm_starts_one_process_a_gpu_and_requeues_what_has_saved(tmp_path):
    text = (LAUNCH / "slurm.sh").read_text()
    flags = dict(line[len("#SBATCH --") :].partition("=")[::2] for line in text.splitlines() if "#SBATCH --" in line)
    assert flags["gpus-per-node"] == flags["ntasks-per-node"]
    assert "requeue" in flags and flags["signal"].startswith("TERM@")
    tools = {"srun": 'echo "srun $@"; exit $CODE', "scontrol": 'echo "scontrol $@"'}
    for name, body in tools.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    for code, again in ((0, False), (1, False), (143, True)):
        environment = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}", "CODE": str(code),
            "SLURM_JOB_ID": "5", "SLURM_CPUS_PER_TASK": "8",
        }  # fmt: skip
        command = ["bash", LAUNCH / "slurm.sh", "--config=configs/tiny.py", "--workdir=runs/a b"]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert run.returncode == code, run.stderr
        assert "-m jstream.train --distributed --config=configs/tiny.py --workdir=runs/a b\n" in run.stdout
        assert ("scontrol requeue 5" in run.stdout) == again


GCLOUD = r"""#!/usr/bin/env bash
printf '%s\n' "${*//$'\n'/ }" >>"$RECORD/calls"
case "$*" in
  *describe*) cat "$RECORD/state" 2>/dev/null ;;
  *create*) echo ACTIVE >"$RECORD/state" ;;
  *delete*) rm "$RECORD/state" ;;
  *scp*) tar -tzf "$5" >"$RECORD/copied" ;;
esac
"""


def test_a_tpu_slice_is_asked_for_once_and_given_back(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/gcloud").write_text(GCLOUD)
    (tmp_path / "bin/gcloud").chmod(0o755)
    script = tmp_path / "checkout/launch/tpu_vm.sh"
    script.parent.mkdir(parents=True)
    script.write_bytes((LAUNCH / "tpu_vm.sh").read_bytes())
    subprocess.run(["git", "init", "-q", tmp_path / "checkout"], check=True)
    environment = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "RECORD": str(tmp_path),
        "PROJECT": "project", "ZONE": "zone", "NFS": "10.0.0.2:/runs", "SPOT": "1",
    }  # fmt: skip

    def calls(*arguments: str) -> str:
        (tmp_path / "calls").write_text("")
        subprocess.run(["bash", script, *arguments], env=environment, check=True, capture_output=True, timeout=60)
        return (tmp_path / "calls").read_text()

    first = calls("--config=configs/tiny.py", "--config.tokenizer=a b")
    assert first.count(" queued-resources create jstream --project=project --zone=zone ") == 1 and " --spot" in first
    assert (tmp_path / "copied").read_text() == "launch/tpu_vm.sh\n"
    assert r"-m jstream.train --distributed --config=configs/tiny.py --config.tokenizer=a\ b >>" in first
    assert "create" not in calls("--config=configs/tiny.py")
    (tmp_path / "state").write_text("SUSPENDED\n")  # as after a preemption
    again = calls("--config=configs/tiny.py")
    assert again.index("queued-resources delete") < again.index("queued-resources create")
    assert "queued-resources delete jstream" in calls("--delete")


@pytest.fixture(scope="module")
def manifests() -> dict[tuple[str, str], dict]:
    documents = yaml.safe_load_all((LAUNCH / "gke.yaml").read_text())
    return {(document["kind"], document["metadata"]["name"]): document for document in documents}


@pytest.mark.parametrize("name", ["jstream-tpu", "jstream-gpu"])
def test_pods_start_together_again_after_a_failure_and_keep_what_they_saved(manifests, name):
    manifest = manifests["JobSet", name]
    assert manifest["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    (replicated,) = manifest["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"  # one ends, all end
    assert job["completions"] == job["parallelism"] and job["completionMode"] == "Indexed"
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] > 0
    (rule,) = manifest["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("RestartJobSetAndIgnoreMaxRestarts", ["PodFailurePolicy"])
    (evicted, interrupted) = job["podFailurePolicy"]["rules"]
    assert evicted == {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget"}]}
    assert interrupted == {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [128 + signal.SIGTERM]}}
    (container,) = pod["containers"]
    assert container["command"] == ["python", "-m", "jstream.train", "--distributed"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    claim = manifests["PersistentVolumeClaim", mounts["/runs"]["persistentVolumeClaim"]["claimName"]]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    (workdir,) = [argument for argument in container["args"] if argument.startswith("--workdir=")]
    assert workdir.startswith("--workdir=/runs/")
    for argument in container["args"]:
        if argument.startswith("--config="):
            assert (LAUNCH.parent / argument.removeprefix("--config=").partition(":")[0]).is_file()


def test_a_tpu_slice_has_a_pod_for_each_of_its_hosts(manifests):
    job = manifests["JobSet", "jstream-tpu"]["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = math.prod(map(int, topology.split("x")))
    assert job["parallelism"] * pod["containers"][0]["resources"]["limits"]["google.com/tpu"] == chips == 64


def test_gpu_pods_take_whole_nodes_and_may_ask_who_is_in_their_job(manifests):
    """`jax.distributed.initialize` lists the pods and reads the Job (jax/_src/clusters/k8s_cluster.py)."""
    pod = manifests["JobSet", "jstream-gpu"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert "hostNetwork" not in pod  # a pod finds itself by its own address
    binding = manifests["RoleBinding", "jstream"]
    assert [subject["name"] for subject in binding["subjects"]] == [pod["serviceAccountName"]]
    assert ("ServiceAccount", pod["serviceAccountName"]) in manifests
    granted = {
        (resource, verb)
        for rule in manifests["Role", binding["roleRef"]["name"]]["rules"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert granted >= {("pods", "list"), ("jobs", "get")}


def test_a_label_tells_what_only_one_of_the_two_needs(manifests):
    labels = {key: manifest["metadata"].get("labels", {}).get("accelerator") for key, manifest in manifests.items()}
    assert labels.pop(("JobSet", "jstream-tpu")) == "tpu"
    assert labels.pop(("PersistentVolumeClaim", "jstream-runs")) is None
    assert set(labels.values()) == {"gpu"}
