"""Workers whose hardware is not to be used any more: drained as an operator would, for as long as that can be done."""

from __future__ import annotations

import logging

from experts.controller.commands import Refused, begin_drain
from experts.controller.member import Member
from experts.controller.planning import tend
from experts.controller.state import Pool

log = logging.getLogger(__name__)

RETRY_SECONDS = 5.0  # after a drain that was refused: memory or workers may have come


def retire_failing(pool: Pool, now: float) -> None:
    """Begin to drain whoever says that its hardware fails; `next_actions` then moves it. Cheap when nobody does.

    What would uncover an expert is not begun: engines ask a failing worker only for what nobody else holds. A worker
    that holds nothing gets nothing. One that an operator drains is left to him.
    """
    for member in pool.live:
        if member.failing and not member.draining and now >= member.retire_at:
            _retire(pool, member, now)


def _retire(pool: Pool, member: Member, now: float) -> None:
    try:
        if member.held or member.loading:
            begin_drain(pool, member.name, now)
        else:
            member.draining = True
            tend(pool, now)
    except Refused as refusal:
        member.retire_at = now + RETRY_SECONDS
        if member.detail != str(refusal):
            member.detail = str(refusal)
            log.warning("%s is not drained, though its hardware fails. %s", member.name, refusal)
    else:
        member.retired, member.detail = True, ""
        log.warning("%s is drained: %s", member.name, member.verdict.reason)
