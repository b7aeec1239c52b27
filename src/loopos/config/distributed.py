"""The section `distributed`: what the processes of a run expect of each other.

Enters: nothing but values. Leaves: `DistributedSection`. Left out: how many processes there are, which the launcher
says.
"""

from __future__ import annotations

from pydantic import Field

from loopos.config.keys import Duration, Section


class DistributedSection(Section):
    """Without effect in a run of one process."""

    timeout: Duration = Field(
        default=600.0, description='time after which a collective counts as hung (seconds, or "90s", "30m", "2h")'
    )
    silence: Duration = Field(
        default=20.0, description='time without a sign of life after which a process counts as lost (seconds, or "90s")'
    )
