"""Reads files of users with limits on size, nesting depth and file type."""

from dwrl_fast.files.bounded import bounded_json, bounded_text, check_size, opened
from dwrl_fast.files.folder import check_folder, check_tensors
from dwrl_fast.files.yaml import bounded_yaml

__all__ = ["bounded_json", "bounded_text", "bounded_yaml", "check_folder", "check_size", "check_tensors", "opened"]
