"""What every test starts from: no compiled code, one seed, hypothesis without luck."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

# A case compiles or rewrites a graph, so neither its time nor a slow draw says anything about the code.
# "function_scoped_fixture": the autouse fixture below has nothing that a second example could spoil.
_UNHURRIED = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]

for _name in ("fast", "full"):  # they differ in what compiles, see `replay.examples`
    settings.register_profile(
        _name, max_examples=40, deadline=None, derandomize=True, suppress_health_check=_UNHURRIED
    )
settings.register_profile(
    "thorough", max_examples=400, deadline=None, derandomize=False, suppress_health_check=_UNHURRIED
)
settings.load_profile(os.environ.get("LUVC_HYPOTHESIS", "fast"))


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No code compiled by another test, the same random numbers, and Dynamo's own settings after it."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    with torch._dynamo.config.patch(
        capture_scalar_outputs=torch._dynamo.config.capture_scalar_outputs,
        caching_precompile=torch._dynamo.config.caching_precompile,
    ):
        yield


def pytest_configure(config: pytest.Config) -> None:
    # torch itself, while Inductor is imported
    config.addinivalue_line(
        "filterwarnings", "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch sees none")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)
