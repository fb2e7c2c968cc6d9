"""What schemathesis is told not to try (it loads this by SCHEMATHESIS_HOOKS)."""

from typing import Any

import schemathesis


@schemathesis.hook
def filter_case(context: Any, case: Any) -> bool:
    """It takes a header that no schema names for invalid; HTTP has servers ignore these."""
    return "x-schemathesis-unknown-property" not in (case.headers or {})
