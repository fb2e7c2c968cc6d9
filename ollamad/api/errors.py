"""Any exception as the one error that a client sees: what is known, told; what is a bug, hidden."""

import logging
from http import HTTPStatus

from werkzeug.exceptions import HTTPException, MethodNotAllowed

from ollamad.api.services import Detail, ServiceError
from ollamad.core.inference import InferenceError

log = logging.getLogger(__name__)


def as_service_error(error: BaseException, request_id: str) -> ServiceError:
    """Translate an exception; what is no fault of who asks is logged once, under the request's id.

    A group is taken for its first known error: nurseries wrap what their tasks raise.
    """
    known = _known(error)
    if known is not None:
        # (503 says that all is well but the moment.)
        if known.status >= 500 and known.status != 503 and "request_id" not in known.details:
            log.error("request %s: %s: %s", request_id, known.code, known.message)
            known.details["request_id"] = request_id
        return known
    log.error("request %s failed", request_id, exc_info=error)
    return ServiceError(
        500,
        "INTERNAL_ERROR",
        f"an internal error; the node's log has it as request {request_id}",
        {"request_id": request_id},
    )


def _known(error: BaseException) -> ServiceError | None:
    match error:
        case ServiceError():
            return error
        case InferenceError(failure=failure):
            return ServiceError(failure.status, failure.code, failure.message, failure.details)
        case HTTPException(code=int(status)) if 400 <= status < 500:
            phrase = HTTPStatus(status).phrase
            details: dict[str, Detail] = {}
            if status == 404:
                message = "there is no such route; GET /api/v1/openapi.json has them all"
            elif isinstance(error, MethodNotAllowed) and error.valid_methods:
                allowed = sorted(error.valid_methods)
                message = f"this route takes {', '.join(allowed)}"
                details = {"allowed": allowed}
            else:
                message = phrase.lower()
            return ServiceError(status, phrase.upper().replace(" ", "_"), message, details)
        case BaseExceptionGroup(exceptions=members):
            return next(filter(None, map(_known, members)), None)
        case _:
            return None
