"""Checks that reject parallel layouts and FP8 settings that cannot work, before anything is built."""
