"""Other versions of vLLM, and changed lines of it, are clear errors."""

from __future__ import annotations

import pytest
from vllm.engine.arg_utils import EngineArgs

from pie_vllm.errors import UnsupportedError
from pie_vllm.vllm.compat import patching

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "0.34.0+cu130", "1.0"])
def test_other_versions_of_vllm_are_refused(version: str) -> None:
    """The error says what was found, what is supported and what to install."""
    with pytest.raises(UnsupportedError) as caught:
        patching.check_version(version)
    for word in (version, ">=0.32,<0.34", "pip install"):
        assert word in str(caught.value)


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1.post1", "0.33.0+cpu"])
def test_supported_versions_of_vllm_pass(version: str) -> None:
    """Local and post versions of a supported release count as that release."""
    patching.check_version(version)


def test_a_changed_line_of_vllm_is_an_error_that_names_it() -> None:
    """A patch that no longer fits fails with the function and the line."""
    with pytest.raises(UnsupportedError, match="create_engine_config has no 'no such line'"):
        patching.expect(EngineArgs.create_engine_config, "no such line")
