"""Floating-point operations, apart by what they are done in and by whether ranks share them."""

from __future__ import annotations

from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class Operations:
    """Of all ranks together; what every rank does for itself counts once.

    Attributes:
        products: of matrices in the compute dtype; ranks share them by windows or rows.
        float32: products for Gram matrices; ranks share them by windows.
        float64: factors of matrices and what is solved with them; ranks share them by layers or by problems.
        own_float32: products that every rank repeats.
        own_float64: what of least squares every rank repeats.
    """

    products: float = 0.0
    float32: float = 0.0
    float64: float = 0.0
    own_float32: float = 0.0
    own_float64: float = 0.0

    @property
    def total(self) -> float:
        return float(sum(astuple(self)))

    def __add__(self, other: Operations) -> Operations:
        return Operations(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: float) -> Operations:
        return Operations(*(times * it for it in astuple(self)))

    def shared(self) -> Operations:
        """The same where ranks share even what each usually repeats."""
        return Operations(self.products, self.float32 + self.own_float32, self.float64 + self.own_float64)


NO_OPERATIONS = Operations()
