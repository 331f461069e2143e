"What holds for all tests: no pickle is trusted unless a test asks for it; and the count of the fuzzed cases."
import pytest
from helpers import FuzzCount

FUZZ = FuzzCount()

@pytest.fixture(autouse=True)
def _no_trust(monkeypatch): monkeypatch.delenv('MEDSYN_TRUST_PICKLE', raising=False)

@pytest.fixture
def trusts_pickles(_no_trust, monkeypatch):
    "For a test that saves weights as a pickle itself, and opens them."
    monkeypatch.setenv('MEDSYN_TRUST_PICKLE', '1')

def pytest_runtest_logreport(report):
    "With pytest-xdist this is called in the main process for the reports of every worker."
    if report.when == 'teardown': FUZZ.add(report.nodeid, dict(report.user_properties).get('fuzz'))

@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    if hasattr(session.config, 'workerinput'): return           # a worker: the main process counts
    if FUZZ.verdict().failed and session.exitstatus in (0, 5): session.exitstatus = 1

def pytest_terminal_summary(terminalreporter):
    if FUZZ.tests: terminalreporter.write_line(FUZZ.verdict().text, red=FUZZ.verdict().failed)
