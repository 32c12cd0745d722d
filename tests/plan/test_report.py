"""The page of a plan, also as a real browser shows it, and the buffers that a compiled program holds."""

import html.parser
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from jaxscale.config import MeshConfig
from jaxscale.mesh import make_abstract_mesh
from jaxscale.models import decoder
from jaxscale.models.presets import preset
from jaxscale.plan.aot import compile_step
from jaxscale.plan.buffers import held_at_peak
from jaxscale.plan.hlo import census
from jaxscale.plan.report import report, schedule, write_report
from jaxscale.plan.search import search
from jaxscale.table import human_bytes


@pytest.fixture(scope="module")
def found():
    return search(preset("llama3-70b"), "v5p:4x4x4", batch_size=256, seq_len=4096)


class _Balanced(html.parser.HTMLParser):
    """Counts tags and fails on one that is closed out of order."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)


def test_the_page_stands_alone_and_says_what_the_plan_says(found):
    page = report(found)
    parser = _Balanced()
    parser.feed(page)
    assert not parser.open
    assert "http" not in page.replace("http-equiv", "") and "<script" not in page  # no server, no request
    assert parser.seen.count("svg") == 5
    for path, _ in jax.tree_util.tree_leaves_with_path(decoder.param_specs(found.model)):
        assert "/".join(k.key for k in path) in page
    assert human_bytes(found.best.memory.total) in page and str(found.best.mesh) in page
    assert str(found.runner_up.mesh) in page
    assert len(re.findall(r"<title>device \d+:", page)) == 64


@pytest.mark.parametrize("pod", ["v5p:4x4x4", "h200:8x8"])
def test_the_timeline_ends_with_the_step_and_holds_every_transfer(pod, rng):
    rows = 64 * int(rng.integers(1, 4))
    best = search(preset("llama3-8b"), pod, batch_size=rows, seq_len=4096).best
    bars = schedule(best)
    assert max(b.start + b.seconds for b in bars) == pytest.approx(best.seconds)
    assert sum(b.seconds for b in bars if b.lane != "computation") == pytest.approx(
        sum(t.seconds for t in best.transfers)
    )
    shown = sum(b.seconds for b in bars if b.lane != "computation" and not b.hidden)
    assert shown == pytest.approx(best.exposed_seconds)
    work = sorted((b.start, b.start + b.seconds) for b in bars if b.lane == "computation")
    assert all(a[1] <= b[0] + 1e-12 for a, b in itertools.pairwise(work))  # a device computes one thing at a time


CHROMIUM = shutil.which("chromium")
QT = """
import sys
from PySide6.QtCore import QTimer, QUrl
from PySide6.QtWebEngineWidgets import QWebEngineView
from PySide6.QtWidgets import QApplication

app, view = QApplication(sys.argv), QWebEngineView()
view.loadFinished.connect(lambda _: QTimer.singleShot(500, lambda: (print("<title>" + view.title()), app.quit())))
view.resize(1200, 3000)
view.load(QUrl.fromLocalFile(sys.argv[1]))
view.show()
app.exec()
"""


@pytest.mark.skipif(
    not CHROMIUM and not importlib.util.find_spec("PySide6"),
    reason="needs chromium (apt-get install chromium, or pip install jaxscale[browser])",
)
def test_a_browser_shows_every_picture(found, tmp_path):
    path = write_report(found, tmp_path / "report.html")
    probe = (
        "<script>document.title=[...document.querySelectorAll('svg')].map(s=>{let r=s.getBBox(),b=s.viewBox.baseVal;"
    )
    probe += "return r.width>300&&r.height>20&&r.y+r.height<=b.height+8&&r.x+r.width<=b.width+40}).join()</script>"
    path.write_text(path.read_text().replace("</body>", probe + "</body>"))
    if CHROMIUM:
        command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu"]
        command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"file://{path}"]
        env = {}
    else:
        command = [sys.executable, "-c", QT, str(path)]
        env = {"QT_QPA_PLATFORM": "offscreen", "QTWEBENGINE_CHROMIUM_FLAGS": "--no-sandbox --disable-gpu"}
        env |= {"QTWEBENGINE_DISABLE_SANDBOX": "1", "XDG_RUNTIME_DIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | env)
    titles = re.search(r"<title>([^<\n]*)", done.stdout)
    assert titles and titles[1] == ",".join(["true"] * 5), done.stderr[-500:]


HLO = """HloModule m, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias) }

%body (p: (f32[1000], s32[])) -> (f32[1000], s32[]) {
  %p = (f32[1000]{0}, s32[]) parameter(0)
  %x = f32[1000]{0} get-tuple-element(%p), index=0
  %i = s32[] get-tuple-element(%p), index=1
  %wide = f32[4000]{0} broadcast(%x), metadata={op_name="jit(f)/wide" source_file="/a/b/c/model.py" source_line=7}
  %y = f32[1000]{0} slice(%wide)
  ROOT %t = (f32[1000]{0}, s32[]) tuple(%y, %i)
}

ENTRY %main (a: f32[1000], b: f32[10]) -> (f32[1000]) {
  %a = f32[1000]{0} parameter(0)
  %b = f32[10]{0} parameter(1)
  %c = f32[1000]{0} negate(%a)
  %dead = f32[1500]{0} broadcast(%b)
  %n = f32[10]{0} slice(%dead)
  %fast = f32[9000]{0:S(1)} broadcast(%n)
  %zero = s32[] constant(0)
  %in = (f32[1000]{0}, s32[]) tuple(%c, %zero)
  %loop = (f32[1000]{0}, s32[]) while(%in), condition=%cond, body=%body
  %d = f32[1000]{0} get-tuple-element(%loop), index=0
  %e = f32[1000]{0} add(%d, %a)
  ROOT %out = (f32[1000]{0}) tuple(%e)
}
"""


def test_the_buffers_of_a_program_by_hand():
    """In the loop: what it carries, the wide array and its slice. Arguments, donated results and caches are no part."""
    held = held_at_peak(HLO)
    assert held.bytes == 4 * (1000 + 4000 + 1000)
    assert held.at == "y"
    assert held.buffers[0][:3] == ("wide", "f32[4000]", 16000)
    assert held.buffers[0].source == "b/c/model.py:7"
    assert held_at_peak(HLO.replace("f32[4000]{0}", "f32[40,100]{1,0:T(8,128)}")).bytes == 4 * (2000 + 40 * 128)
    with pytest.raises(ValueError, match="ENTRY"):
        held_at_peak("HloModule m\n")


def test_the_buffers_of_a_compiled_step_add_up_to_what_the_compiler_assigned(rng):
    cfg = preset("tiny")
    compiled = compile_step(cfg, MeshConfig(fsdp=2), "cpu:2", batch_size=8, seq_len=256, remat="full")
    held = compiled.held()
    assert held.bytes == pytest.approx(compiled.memory.temporaries, rel=0.2)
    assert any("decoder.py" in b.source or "layers.py" in b.source for b in held.buffers[:10])
    assert held.buffers[0].bytes == max(b.bytes for b in held.buffers)
    assert compiled.memory.arguments > 3 * 4 * jnp.asarray(128 * 256).item() // 2  # the state is no part of it


ASYNC = """HloModule m, num_partitions=4

%called (p: f32[8]) -> f32[32] {
  %p = f32[8]{0} parameter(0)
  ROOT %g = f32[32]{0} all-gather(%p), replica_groups={{0,1,2,3}}, dimensions={0}
}

ENTRY %main (a: f32[8]) -> f32[32] {
  %a = f32[8]{0} parameter(0)
  %s = ((), (), s32[]) call-start(), async_execution_thread="sparsecore", to_apply=%called
  %u = ((f32[8]{0}), f32[32]{0}) call-update(%s, %a)
  ROOT %d = f32[32]{0} call-done(%u)
}
"""


def test_collectives_that_run_beside_computation_are_counted_once():
    """The form that libtpu writes for tpu7x."""
    found = census(ASYNC, mesh=make_abstract_mesh(MeshConfig(fsdp=4)))
    assert found.counts == {"all-gather": {"fsdp": 1}} and found.bytes == {"all-gather": {"fsdp": 128}}


@pytest.mark.parametrize(
    ("started", "held"),
    [
        ("", 128),  # as above: what the call makes is named by its update alone
        ("(f32[8], f32[32]) all-gather-start(%a)", 128),
        ("((f32[8], f32[8]), (f32[32], f32[16]), u32[]) all-gather-start(%a, %a)", 192),
    ],
)
def test_buffers_of_what_runs_beside_computation(started, held):
    """What an asynchronous operation reads is no new buffer, what it makes is one, whatever tuples its type is of."""
    text = ASYNC
    if started:
        before, _, _ = text.partition("  %s =")
        text = f"{before}  %s = {started}\n  ROOT %d = f32[32]{{0}} all-gather-done(%s)\n}}\n"
    assert held_at_peak(text).bytes == held
