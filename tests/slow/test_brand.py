"""Our nodes in a graph of BRAND itself: its supervisor, and a node of its Python base class.

git clone https://github.com/brandbci/brand /tmp/brand
python -m venv /tmp/brand-venv && /tmp/brand-venv/bin/pip install sh coloredlogs redis pyyaml numpy
BRAND_DIR=/tmp/brand BRAND_PYTHON=/tmp/brand-venv/bin/python pytest tests/slow/test_brand.py
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import redis
import yaml

from b2txt_jax import load_run
from b2txt_jax.data.reader import open_folder
from lm_server.client.brand import number_of
from lm_server.serving.embedded_redis import find_program

REPOSITORY = Path(__file__).parents[2]
BRAND_DIR = os.environ.get("BRAND_DIR")
BRAND_PYTHON = os.environ.get("BRAND_PYTHON", sys.executable)

pytestmark = pytest.mark.skipif(not BRAND_DIR, reason="needs BRAND_DIR, a clone of brandbci/brand")

GENERATOR = """#!{python}
import json, time
import numpy as np
from brand.node import BRANDNode


class Generator(BRANDNode):
    def work(self):
        while not self.r.xrange("b2txt_decoder_state") or not any(
            fields[b"status"] == b"NODE_READY" for _, fields in self.r.xrange("b2txt_decoder_state")
        ):
            time.sleep(0.1)
        self.r.xadd("trial_state", {{"mark": "begin", "name": "first"}})
        for number, values in enumerate(np.load(self.parameters["features"])):
            self.r.xadd("binned_features", {{
                "ts": np.uint64(time.monotonic_ns()).tobytes(),
                "sync": json.dumps({{"generator": number}}).encode(),
                "i": np.uint64(number).tobytes(),
                "samples": values.astype(np.float32).tobytes(),
            }})
            time.sleep(0.002)
        self.r.xadd("trial_state", {{"mark": "end"}})
        time.sleep(3600)


Generator().run()
"""


def wait(condition, process, seconds=240):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        assert process.poll() is None, "the supervisor ended"
        time.sleep(0.1)
    raise AssertionError("nothing came in time")


def test_a_trial_of_a_brand_graph_is_decoded_as_offline(tmp_path, tiny_overrides, build_lm):
    command = [sys.executable, "-m", "b2txt_jax.cli", "train", "--config", "demo"]
    run_dir = tmp_path / "run"
    subprocess.run([*command, "--workdir", str(run_dir), *tiny_overrides], check=True)
    run = load_run(run_dir)
    trial = run.logits("val")[0]
    with open_folder(run.config.data.root, run.config.data.feature_count) as reader:
        features = reader.read(trial.ref).features
    np.save(tmp_path / "features.npy", features)
    node = tmp_path / "module/nodes/generator"
    node.mkdir(parents=True)
    (node / "generator.bin").write_text(GENERATOR.format(python=BRAND_PYTHON))
    (node / "generator.bin").chmod(0o755)
    graph = yaml.safe_load((REPOSITORY / "brand/graphs/speech.yaml").read_text())
    for one in graph["nodes"]:
        one["module"] = str(REPOSITORY / "brand")
        del one["run_priority"]  # real time needs rights
    lm, decoder = (one["parameters"] for one in graph["nodes"])
    lm["lm"] = str(build_lm(["how are you today", "the cat sat on the mat"]))
    decoder |= {"workdir": str(run_dir), "day": trial.ref.session}
    graph["nodes"].append(
        {
            "name": "generator",
            "nickname": "generator",
            "module": str(tmp_path / "module"),
            "parameters": {"log": "INFO", "features": str(tmp_path / "features.npy")},
        }
    )
    (tmp_path / "graph.yaml").write_text(yaml.safe_dump(graph))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/redis-server").symlink_to(find_program())
    environment = {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{BRAND_DIR}/lib/python",
    }
    socket, port = str(tmp_path / "redis.sock"), "16399"
    arguments = ["-g", str(tmp_path / "graph.yaml"), "-i", "127.0.0.1", "-p", port]
    arguments += ["-s", socket, "-d", str(tmp_path / "data")]
    with subprocess.Popen(
        [BRAND_PYTHON, "supervisor/supervisor.py", *arguments], cwd=BRAND_DIR, env=environment
    ) as supervisor:
        wait(lambda: Path(socket).exists(), supervisor)
        client = redis.Redis(unix_socket_path=socket, protocol=2)
        try:
            wait(lambda: client.exists("supergraph_stream"), supervisor)
            client.xadd("supervisor_ipstream", {"commands": "startGraph"})
            final = wait(
                lambda: [
                    fields
                    for _, fields in client.xrange("b2txt_decoder_text")
                    if fields[b"event"] == b"final"
                ],
                supervisor,
            )
            frames = [fields for _, fields in client.xrange("b2txt_decoder_logits")]
            client.xadd("supervisor_ipstream", {"commands": "stopGraph"})

            def ended():
                names = ("lm", "b2txt_decoder")
                states = [client.xrevrange(f"{name}_state", count=1)[0][1] for name in names]
                return all(state[b"status"] == b"NODE_SHUTDOWN" for state in states)

            wait(ended, supervisor)
        finally:
            supervisor.send_signal(signal.SIGINT)
            try:
                supervisor.wait(30)
            except subprocess.TimeoutExpired:
                supervisor.kill()
            client.shutdown(nosave=True)
    logits = np.stack([np.frombuffer(fields[b"logits"], "<f4") for fields in frames])
    np.testing.assert_allclose(logits, trial.logits, atol=1e-4)
    assert b"text" in final[0]
    numbers = [number_of(fields[b"i_in"]) for fields in frames]
    assert numbers == sorted(numbers)
    assert json.loads(frames[0][b"sync"]) == {"generator": numbers[0]}
