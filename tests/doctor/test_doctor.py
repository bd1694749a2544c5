"""Claims about `b2txt doctor`, each on a machine, folder or server that is really broken so."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import h5py
import pytest

from b2txt_jax.config import load_config
from b2txt_jax.doctor import checks
from b2txt_jax.doctor import command as doctor
from b2txt_jax.doctor.checks import TpuChips
from lm_server.__main__ import _parser as lm_server_parser
from lm_server.lm.build import build
from lm_server.lm.reader import FORMAT
from lm_server.serving.embedded_redis import find_program

REPOSITORY = Path(__file__).parents[2]
NONE, V5E = TpuChips(None, 0), TpuChips("v5e", 8)
REQUIRES = ["numpy>=2.0", "jaxlib<=0.10.2,>=0.10.1", 'libtpu==0.0.42.*; extra == "tpu"']
GB = 10**9


def diagnose(capsys, *arguments: str, overrides: tuple[str, ...] = ()) -> tuple[int, dict, str]:
    """Exit status, findings by name, and everything printed."""
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    args = parser.parse_args([*arguments, "--json"])
    args.overrides = list(overrides)
    status = doctor.run(args)
    captured = capsys.readouterr()
    found = json.loads(captured.out)["findings"]
    return status, {finding["name"]: finding for finding in found}, captured.out + captured.err


# ---------------------------------------------------------------------------------- machine


def pci_device(folder: Path, vendor: str, device: str) -> None:
    folder.mkdir(parents=True)
    (folder / "vendor").write_text(vendor + "\n")
    (folder / "device").write_text(device + "\n")


def test_tpu_chips_are_told_from_other_devices_on_the_bus(tmp_path):
    for number in range(4):
        pci_device(tmp_path / f"0000:00:0{number}.0", "0x1ae0", "0x0063")
    pci_device(tmp_path / "0000:00:08.0", "0x1ae0", "0x001f")  # Google's disk
    pci_device(tmp_path / "0000:00:09.0", "0x10de", "0x0063")  # another maker's
    assert checks.find_tpu_chips(tmp_path) == TpuChips("v5e", 4)
    assert checks.find_tpu_chips(tmp_path / "no such bus") == NONE


def test_the_numbers_of_tpus_are_those_that_jax_knows():
    from jax._src import hardware_utils

    known = {number: version.name for number, version in hardware_utils._TPU_PCI_DEVICE_IDS.items()}
    assert {number: known[number] for number in checks._TPU_GENERATIONS} == checks._TPU_GENERATIONS


@pytest.mark.parametrize(
    ("jaxlib", "libtpu", "chips", "status", "said"),
    [
        ("0.10.2", None, NONE, "ok", "libtpu missing"),
        ("0.10.2", "0.0.42.1", V5E, "ok", "libtpu 0.0.42.1"),
        ("0.10.2", None, V5E, "problem", "8 TPU v5e chips"),
        ("0.10.2", "0.0.48", V5E, "problem", "needs libtpu ==0.0.42.*"),
        ("0.10.2", "0.0.48", NONE, "warning", "needs libtpu ==0.0.42.*"),
        ("0.10.3", None, NONE, "problem", "needs jaxlib"),
        (None, None, NONE, "problem", "jaxlib missing"),
    ],
)
def test_versions_that_do_not_belong_together_are_named(jaxlib, libtpu, chips, status, said):
    installed = {"jax": "0.10.2", "jaxlib": jaxlib, "libtpu": libtpu}
    finding = checks.check_versions(installed, REQUIRES, chips)
    assert finding.status == status
    assert said in finding.found
    assert ("pip install" in finding.advice) == (status != "ok")


def test_this_installation_belongs_together():
    installed = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    requires = importlib.metadata.requires("jax")
    assert checks.check_versions(installed, requires, NONE).status == "ok"


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_the_devices_are_those_of_this_machine():
    finding, devices = checks.check_devices(NONE)
    assert finding.status == "ok"
    assert f"{devices} " in finding.found
    assert "device(s)" in finding.found


def test_devices_of_other_hosts_count_too():
    answer = """print('DEVICES ["tpu", 4, "TPU v4", 16]')"""
    finding, devices = checks.check_devices(TpuChips("v4", 4), (), python(answer))
    assert finding == checks.Finding("devices", "ok", "4 tpu device(s), TPU v4; 16 on all hosts")
    assert devices == 16


def test_chips_that_jax_does_not_use_are_a_problem(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    finding, _ = checks.check_devices(V5E)  # JAX runs, on the CPU
    assert finding.status == "problem"
    assert "machine has 8 TPU v5e chips" in finding.found
    assert "it is 'cpu'" in finding.advice


def test_chips_in_use_are_a_problem_that_names_the_process():
    message = "The TPU is already in use by process with pid 4242."
    finding, _ = checks.check_devices(V5E, (), python(f"raise SystemExit({message!r})"))
    assert finding.status == "problem"
    assert "pid 4242" in finding.found
    assert "end the one named" in finding.advice
    held, _ = checks.check_devices(V5E, ["pid 7 (python)"], python("raise SystemExit('no')"))
    assert "in use by pid 7 (python)" in held.advice


def test_a_runtime_that_hangs_is_a_problem_and_ends():
    started = time.monotonic()
    finding, _ = checks.check_devices(V5E, (), python("import time; time.sleep(600)"), timeout=0.5)
    assert time.monotonic() - started < 120
    assert finding.status == "problem"
    assert "did not answer" in finding.found


def test_the_process_that_holds_a_device_file_is_found(tmp_path):
    device = tmp_path / "accel0"
    device.touch()
    code = f"f = open({str(device)!r}); print('open', flush=True); input()"
    with subprocess.Popen(
        python(code), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        (found,) = checks.find_holders([str(tmp_path / "accel")])
        assert found.startswith(f"pid {holder.pid} (python")
        holder.communicate("\n")
    assert checks.find_holders([str(tmp_path / "accel")]) == []


@pytest.mark.parametrize(
    ("text", "generation", "status", "advised"),
    [
        ("always madvise [never]\n", "v5e", "warning", "echo always"),
        ("always [madvise] never\n", "v6e", "warning", "echo always"),
        ("[always] madvise never\n", "v5e", "ok", ""),
        ("always [madvise] never\n", "v4", "ok", ""),
        ("always madvise [never]\n", None, "warning", "echo madvise"),
        ("always [madvise] never\n", None, "ok", ""),
        ("", "v5e", "ok", ""),
    ],
)
def test_huge_pages_are_asked_for_as_the_machine_needs_them(
    text, generation, status, advised, tmp_path
):
    (tmp_path / "enabled").write_text(text)
    finding = checks.check_huge_pages(generation, tmp_path / "enabled")
    assert finding.status == status
    assert advised in finding.advice
    assert (str(tmp_path / "enabled") in finding.advice) == (status != "ok")


def test_a_disk_is_measured_where_the_folder_will_be(tmp_path):
    folder = tmp_path / "not" / "made yet"
    free = shutil.disk_usage(tmp_path).free
    assert checks.check_disk("disk", folder, 1e6).status == "ok"
    assert checks.check_disk("disk", folder, 0.8 * free).status == "warning"
    full = checks.check_disk("disk", folder, 2 * free)
    assert full.status == "problem"
    assert "GB needed" in full.found
    assert not folder.parent.exists()


def test_a_folder_that_cannot_be_written_to_is_a_problem(tmp_path):
    (tmp_path / "file").touch()
    finding = checks.check_writable("cache", tmp_path / "file/cache", "use another")
    assert (finding.status, finding.advice) == ("problem", "use another")
    assert checks.check_writable("cache", tmp_path / "cache", "").status == "ok"
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_container_has_the_memory_of_its_limit(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9000000 kB\nMemAvailable:  4000000 kB\n")
    assert checks.available_memory(meminfo, tmp_path) == 4_096_000_000
    (tmp_path / "memory.current").write_text("1000000000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert checks.available_memory(meminfo, tmp_path) == 4_096_000_000
    (tmp_path / "memory.max").write_text("3000000000\n")
    assert checks.available_memory(meminfo, tmp_path) == 2_000_000_000
    assert checks.available_memory(tmp_path / "none", tmp_path / "none") is None


def test_what_this_machine_has_free_is_less_than_what_it_has():
    available = checks.available_memory()
    assert available is not None
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < available <= total


@pytest.mark.parametrize(
    ("soft", "hard", "status", "advised"),
    [
        (100, 4096, "problem", "ulimit -n 4096"),
        (1000, -1, "warning", "ulimit -n 65536"),
        (1024, 4096, "ok", ""),
        (-1, -1, "ok", ""),
    ],
)
def test_few_open_files_are_told(soft, hard, status, advised):
    finding = checks.check_open_files(soft, hard)
    assert finding.status == status
    assert advised in finding.advice


def test_a_clock_in_the_past_is_a_problem():
    written = Path(doctor.__file__).stat().st_mtime
    assert checks.check_clock(written).status == "ok"
    assert checks.check_clock(written, now=0.0).status == "problem"
    assert checks.check_clock_difference(-60.0).status == "warning"
    assert checks.check_clock_difference(0.2).status == "ok"


# ------------------------------------------------------------------------------------- Redis


@pytest.fixture
def redis_url(tmp_path):
    """A Redis with a password."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [find_program(), "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    command += ["--requirepass", "right-secret", "--dir", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        for _ in range(100):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield f"redis://:right-secret@127.0.0.1:{port}/0"
        server.terminate()


def test_a_redis_that_answers_is_well_and_a_wrong_password_is_not(redis_url):
    well, clock = doctor.check_redis(redis_url)
    assert well.status == clock.status == "ok"
    (refused,) = doctor.check_redis(redis_url.replace("right-secret", "wrong-secret"))
    assert refused.status == "problem"
    assert "login" in refused.found
    (nobody,) = doctor.check_redis(redis_url.replace(":right-secret@", ""))
    assert nobody.status == "problem"


def test_a_closed_port_is_a_problem_and_the_password_stays_hidden(capsys):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"redis://:very-secret@127.0.0.1:{probe.getsockname()[1]}/0"
    status, findings, printed = diagnose(capsys, "--redis", url)
    assert status == 1
    assert findings["Redis"]["status"] == "problem"
    assert "redis-server" in findings["Redis"]["advice"]
    assert "very-secret" not in printed


def test_the_redis_that_other_commands_would_take_is_looked_at(capsys, monkeypatch, redis_url):
    monkeypatch.setenv("B2TXT_REDIS_URL", redis_url)
    _, findings, printed = diagnose(capsys)
    assert findings["Redis"]["status"] == "ok"
    assert "right-secret" not in printed


def test_what_is_no_redis_url_is_told():
    (finding,) = doctor.check_redis("http://127.0.0.1:6379")
    assert finding.status == "problem"
    assert "needed redis://" in finding.advice


# --------------------------------------------------------------------------- language models


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm")
    (folder / "text.txt").write_text("The cat sat.\nA cat ran.\n" * 200)
    (folder / "words.dict").write_text("a AH\ncat K AE T\nran R AE N\nsat S AE T\nthe DH AH\n")
    build([folder / "text.txt"], 2, str(folder / "words.dict"), folder / "model")
    return folder / "model"


def test_a_language_model_is_well_and_its_format_is_the_servers(language_model):
    finding = checks.check_language_model(language_model, 8 * GB)
    assert finding.status == "ok"
    assert "2-gram model of 5 words" in finding.found
    assert checks._LM_FORMAT == FORMAT


@pytest.mark.parametrize("file", ["lm.json", "lm.bin", "lexicon.txt"])
@pytest.mark.parametrize("damage", ["missing", "empty"])
def test_a_language_model_that_is_not_whole_is_a_problem(language_model, tmp_path, file, damage):
    folder = shutil.copytree(language_model, tmp_path / "copy")
    (folder / file).unlink()
    if damage == "empty":
        (folder / file).touch()
    finding = checks.check_language_model(folder, 8 * GB)
    assert finding.status == "problem"
    assert file in finding.found
    assert "lm-server build" in finding.advice


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"format": 1}', '{"format": 9, "words": 5, "order": 2}']
)
def test_a_description_that_cannot_be_used_is_a_problem(language_model, tmp_path, text):
    folder = shutil.copytree(language_model, tmp_path / "copy")
    (folder / "lm.json").write_text(text)
    assert checks.check_language_model(folder, 8 * GB).status == "problem"


def test_a_model_that_does_not_fit_is_a_problem(language_model):
    assert checks.check_language_model(language_model, 1000).status == "problem"
    assert checks.check_language_model(language_model / "nowhere", 8 * GB).status == "problem"


def test_the_largest_opt_that_fits_is_named():
    assert checks.check_opt("6.7b", "float16", 24 * GB).status == "ok"
    finding = checks.check_opt("6.7b", "float32", 24 * GB)
    assert finding.status == "problem"
    assert finding.advice.endswith("2.7b")
    assert "none of them" in checks.check_opt("125m", "float32", GB).advice


# ------------------------------------------------------------------------------ data and runs


def count_trials(root: Path, split: str) -> int:
    total = 0
    for path in root.glob(f"*/data_{split}.hdf5"):
        with h5py.File(path) as file:
            total += len(file)
    return total


def test_a_run_that_can_start_has_no_problem(capsys, narrow, tiny_overrides, tmp_path):
    workdir = tmp_path / "run"
    arguments = ["--config", str(REPOSITORY / "configs/demo.py"), "--workdir", str(workdir)]
    status, findings, _ = diagnose(capsys, *arguments, overrides=tuple(tiny_overrides))
    assert status == 0, findings
    train, val = (count_trials(narrow, split) for split in ("train", "val"))
    found = findings["data"]["found"]
    assert f"4 sessions, {train} training and {val} validation trials" in found
    assert "buckets 180x40" in findings["data"]["found"]
    assert findings["memory"]["status"] == "ok"
    assert not workdir.exists()


def test_a_damaged_session_is_a_problem_that_names_it(capsys, narrow, tiny_overrides, tmp_path):
    root = shutil.copytree(narrow, tmp_path / "data")
    file = next(root.glob("*/data_train.hdf5"))
    file.write_bytes(file.read_bytes()[:1000])
    status, findings, _ = diagnose(
        capsys,
        *["--config", str(REPOSITORY / "configs/demo.py"), "--data", str(root)],
        overrides=tuple(tiny_overrides),
    )
    assert status == 1
    assert findings["data"]["status"] == "problem"
    assert file.parent.name in findings["data"]["found"]


@pytest.mark.parametrize(
    ("batch", "devices", "model_axis", "status", "advised"),
    [
        ((4, 16, 64), 64, 1, "ok", ""),
        ((4, 16, 64), 128, 1, "problem", "trials_per_day=32 --config.data.eval_batch_size=128"),
        ((4, 16, 64), 128, 2, "ok", ""),
        ((4, 16, 64), 8, 3, "problem", "parallel.model_axis"),
        ((4, 2, 32), 32, 1, "problem", "trials_per_day=8 --config.data.eval_batch_size=32"),
        ((4, 2, 4), 8, 1, "problem", "trials_per_day=2 --config.data.eval_batch_size=8"),
        ((3, 1, 8), 8, 1, "problem", "trials_per_day=8 --config.data.eval_batch_size=8"),
    ],
)
def test_devices_that_cannot_share_a_batch_are_a_problem(
    batch, devices, model_axis, status, advised
):
    finding = checks.check_rows(*batch, devices, model_axis)
    assert finding.status == status
    assert advised in finding.advice


@pytest.mark.slow
def test_the_batch_is_compared_with_the_devices_that_jax_has(capsys, tiny_overrides, monkeypatch):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    monkeypatch.setenv("XLA_FLAGS", flags)
    config = ("--config", str(REPOSITORY / "configs/demo.py"))
    status, findings, _ = diagnose(capsys, *config, overrides=tuple(tiny_overrides))
    assert status == 1
    assert "8 devices cannot share 4 rows" in findings["batch"]["found"]
    more = ("--config.data.trials_per_day=2", "--config.data.eval_batch_size=8")
    _, findings, _ = diagnose(capsys, *config, overrides=(*tiny_overrides, *more))
    assert findings["batch"]["found"] == "8 rows, 1 for each of 8 devices"


@pytest.mark.slow
def test_a_root_without_a_configuration_is_looked_at_and_other_keys_are_named(capsys, simulated):
    root = f"--config.data.root={simulated / 'hdf5_data_final'}"
    status, findings, _ = diagnose(capsys, overrides=(root, "--config.model.units=3"))
    assert status == 0
    assert "4 sessions, 32 training trials" in findings["data"]["found"]
    assert findings["configuration"]["status"] == "warning"
    assert "--config.model.units=3 not checked" in findings["configuration"]["found"]
    status, findings, _ = diagnose(capsys, overrides=("--config.data.root=/no/such/folder",))
    assert (status, findings["data"]["status"]) == (1, "problem")


def test_data_alone_is_listed(capsys, simulated):
    status, findings, _ = diagnose(capsys, "--data", str(simulated / "hdf5_data_final"))
    assert status == 0
    assert "4 sessions, 32 training trials" in findings["data"]["found"]


@pytest.mark.slow
def test_a_folder_without_sessions_and_a_wrong_key_are_problems(capsys, tmp_path):
    status, findings, _ = diagnose(capsys, "--data", str(tmp_path))
    assert (status, findings["data"]["status"]) == (1, "problem")
    status, findings, _ = diagnose(
        capsys,
        *["--config", str(REPOSITORY / "configs/demo.py")],
        overrides=("--config.model.unts=3",),
    )
    assert (status, findings["configuration"]["status"]) == (1, "problem")
    assert "model.units" in findings["configuration"]["found"]


def test_training_on_a_cpu_takes_more_host_memory_than_beside_an_accelerator(tiny_config):
    sizes, state = doctor.Sizes([(4, 320)], (4, 320)), 10**8
    beside = doctor.training_memory(tiny_config, state, sizes, on_accelerator=True)
    alone = doctor.training_memory(tiny_config, state, sizes, on_accelerator=False)
    assert alone - beside > 2 * state


def test_rows_that_trials_share_take_less_memory(simulated):
    def alone(packing: str) -> tuple[float, doctor.Sizes]:
        root = simulated / "hdf5_data_final"
        keys = (f"data.root={root}", f"data.packing={packing}", "data.buckets=((640, 80),)")
        config = load_config("demo", [f"--config.{key}" for key in keys])
        _, sizes, _ = doctor._data(config, 2)
        return doctor.training_memory(config, 0, sizes, on_accelerator=False), sizes

    (shared, packed), (apart, whole) = alone("on"), alone("off")
    assert whole.training == [(16, 640)]
    assert all(rows % 2 == 0 and rows * bins < 16 * 640 for rows, bins in packed.training)
    assert shared < apart


def test_lines_for_people_say_each_finding_and_what_to_do(capsys, tmp_path):
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    assert doctor.run(parser.parse_args(["--lm", str(tmp_path / "[bold]nowhere")])) == 1
    out = capsys.readouterr().out
    assert "problem language model" in out
    assert f"there is no folder {tmp_path}/[bold]nowhere" in out
    assert "-> lm-server build" in out
    assert out.splitlines()[-1].startswith("1 problems")


def test_packages_that_decoding_lacks_are_a_problem_with_the_extra_that_brings_them():
    def none(name):
        return None

    (finding,) = checks.check_packages("decoding here", "lm", ("kenlm", "flashlight"), none)
    assert (finding.status, finding.found) == (
        "problem",
        "decoding here needs kenlm and flashlight, not installed here",
    )
    assert "pip install '.[lm]' -c constraints.txt" in finding.advice
    assert checks.check_packages("decoding here", "lm", ("kenlm",), lambda name: name) == []


@pytest.mark.slow
def test_much_padding_and_sessions_too_few_for_a_batch_are_found(capsys, tiny_overrides):
    config = ("--config", str(REPOSITORY / "configs/demo.py"))
    wide = "--config.data.buckets=((3000,80),)"
    alone = "--config.data.packing=off"
    status, findings, _ = diagnose(capsys, *config, overrides=(*tiny_overrides, wide, alone))
    assert (status, findings["data"]["status"]) == (0, "warning")
    assert "96% of a training batch is padding" in findings["data"]["found"]
    assert "--config.data.buckets='()'" in findings["data"]["advice"]
    few = "--config.data.days_per_batch=9"
    status, findings, _ = diagnose(capsys, *config, overrides=(*tiny_overrides, few))
    assert (status, findings["data"]["status"]) == (1, "problem")
    assert "4 sessions have training trials; a batch needs 9" in findings["data"]["found"]


@pytest.mark.parametrize(
    "finding",
    [
        lambda folder: checks.check_language_model(folder, None),
        lambda _: doctor.check_redis("redis://127.0.0.1:1/0")[0],
    ],
)
def test_every_command_that_is_advised_is_complete_and_quoted(finding, tmp_path):
    advice = finding(tmp_path / "a b$c").advice
    words = shlex.split(advice[advice.index("lm-server") :])[1:]
    parsed = lm_server_parser().parse_args(words)
    if parsed.command == "build":
        assert parsed.out == tmp_path / "a b$c"
