"""Settings of ``data.canaries``."""

from dataclasses import dataclass, field

from defenses.errors import UserError

KINDS = ("noise", "heldout")
LEAST_POOL = 32  # pictures; a smaller pool has no exposure of 5 bits


@dataclass(kw_only=True)
class CanariesConfig:
    """Which canaries the trainer plants (`train.planting`); `eval.exposure` measures them.

    Rows in training: the sum of ``copies`` times ``per_copies``, and half of ``coins``, for each kind.
    """

    # noise: uniform noise, the same for every data set; heldout: pictures of the held-out split, which then leave it
    kinds: list[str] = field(default_factory=lambda: ["noise"])
    copies: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 64])  # rows of a canary; []: coins alone
    per_copies: int = 2  # canaries of each number of copies
    coins: int = 0  # further canaries of one copy, each planted or not by a fair coin, for a lower bound on epsilon
    pool: int = 1024  # pictures of the same draw that are never planted, at most; exposure ends at log2 of it
    seed: int = 0  # of the pictures and of the choice among the held-out ones; the coins follow run.seed

    def __post_init__(self) -> None:
        if not self.kinds or len(set(self.kinds)) < len(self.kinds) or not set(self.kinds) <= set(KINDS):
            raise UserError("data.canaries.kinds", f"is {self.kinds}", f"use some of {', '.join(KINDS)}, each once")
        if len(set(self.copies)) < len(self.copies) or any(number < 1 for number in self.copies):
            raise UserError("data.canaries.copies", f"is {self.copies}", "use different positive numbers")
        if self.per_copies < 1:
            raise UserError("data.canaries.per_copies", f"is {self.per_copies}", "use 1 or more")
        if self.coins < 0 or self.coins == 1:
            raise UserError("data.canaries.coins", f"is {self.coins}", "0: none; 1,000 can refute an epsilon of 4")
        if not self.copies and not self.coins:
            raise UserError("data.canaries.copies", "and coins ask for no canary", "set data.canaries=null")
        if self.pool < LEAST_POOL:
            raise UserError("data.canaries.pool", f"{self.pool} is too small", f"at least {LEAST_POOL}; 1024 is usual")
        if self.seed < 0:
            raise UserError("data.canaries.seed", "is negative", "use 0 or more")
