"""Prove a merge: a judge that shares no arithmetic with the merge."""

from __future__ import annotations

from lora_merge_cli.verification.checks import CHECK_IDS, Judging
from lora_merge_cli.verification.expectation import ANY_DTYPE
from lora_merge_cli.verification.judgement import (
    Opened,
    Verdict,
    VerifyRequest,
    judge,
    open_request,
    open_result,
    verify,
)

__all__ = [
    "ANY_DTYPE",
    "CHECK_IDS",
    "Judging",
    "Opened",
    "Verdict",
    "VerifyRequest",
    "judge",
    "open_request",
    "open_result",
    "verify",
]
