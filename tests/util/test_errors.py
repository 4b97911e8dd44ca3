"""Messages name options as the command line and Python take them."""

import pytest

from laserrec.util.errors import option


@pytest.mark.parametrize(("arguments", "told"), [
    (("overwrite",), "--overwrite (Python: overwrite=True)"),
    (("on_error", "skip"), '--on-error skip (Python: on_error="skip")'),
    (("separator", ";"), '--separator ";" (Python: separator=";")'),
    (("separator", "\t"), r'--separator "\t" (Python: separator="\t")'),
])
def test_an_option_is_a_flag_and_an_argument(arguments, told):
    assert option(*arguments) == told
