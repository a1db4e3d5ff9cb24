"""What tokens cost. A price that is not known makes the cost unknown, which is not the same as nothing."""

from __future__ import annotations

from alignkit.core.config import PricesConfig

NOT_KNOWN = "n/a"


def cost(prices: PricesConfig, prompt_tokens: int | None, completion_tokens: int | None) -> float | None:
    """(prompt · input + completion · output) / 10⁶, in the currency of the prices; None where any of the four is."""
    parts = (prompt_tokens, prices.input_per_million, completion_tokens, prices.output_per_million)
    if None in parts:
        return None
    prompt, input_price, completion, output_price = (float(part) for part in parts if part is not None)
    return (prompt * input_price + completion * output_price) / 1e6


def show_cost(amount: float | None, prices: PricesConfig) -> str:
    """An amount with its currency and the date of the prices; "n/a" when it is not known."""
    if amount is None:
        return NOT_KNOWN
    digits = 2 if amount == 0 or amount >= 1 else 4
    dated = f" (prices of {prices.as_of})" if prices.as_of else ""
    return f"{amount:,.{digits}f} {prices.currency}{dated}"
