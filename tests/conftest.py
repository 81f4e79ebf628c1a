"""Shared fixtures and Hypothesis profiles."""

from __future__ import annotations

import hypothesis

hypothesis.settings.register_profile("ci", deadline=None, max_examples=60, derandomize=True)
hypothesis.settings.load_profile("ci")
