"""Tests; helpers in `small`, `fabricate` and `reference`."""
