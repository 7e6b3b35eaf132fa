"""Checks a setup before a run, including the agreement of sampler and trainer. A check is a function that returns a
`Finding`. examination.py calls all checks in order; start.py calls some of them at the start of every training.
"""

from dwrl_fast.doctor.examination import embedded_task, examine
from dwrl_fast.doctor.finding import Finding, Report
from dwrl_fast.doctor.options import DoctorConfig, parse_doctor
from dwrl_fast.doctor.start import check_start

__all__ = ["DoctorConfig", "Finding", "Report", "check_start", "embedded_task", "examine", "parse_doctor"]
