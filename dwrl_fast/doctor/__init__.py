"""What is wrong with a set-up, found before a run, and the proof that sampler and trainer agree. A check is a function
that gives a `Finding`; examination.py calls them in order, start.py a few of them at the start of every training.
"""

from dwrl_fast.doctor.examination import embedded_task, examine
from dwrl_fast.doctor.finding import Finding, Report
from dwrl_fast.doctor.options import DoctorConfig, parse_doctor
from dwrl_fast.doctor.start import check_start

__all__ = ["DoctorConfig", "Finding", "Report", "check_start", "embedded_task", "examine", "parse_doctor"]
