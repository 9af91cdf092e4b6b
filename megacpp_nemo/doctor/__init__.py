"""What of this machine works for training, what does not, and the command that repairs it.

    from megacpp_nemo.doctor import examine

    report = examine(quick=True)
    print(report.ok, [finding.fix for finding in report.faults])

- `findings`: what a check says, and a report of many
- `packages`: installed versions against the package's own requirements, nothing imported
- `machine`: Python, programs on PATH, a Megatron-LM tree
- `probe`: the imports themselves, in a process of their own, which may crash or hang
- `imports`: runs the probe; `steps`, `plugin`, `lanes`: what its outcome means

Nothing here needs torch or NeMo, and a fault of theirs is a finding, never an exception.
"""

from megacpp_nemo.doctor.examination import examine
from megacpp_nemo.doctor.findings import Finding, Report, State

__all__ = ["Finding", "Report", "State", "examine"]
