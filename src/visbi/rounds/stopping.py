"""When to stop: another round would move the posterior by less than its own error."""

from collections.abc import Sequence

from visbi.rounds.errors import Errors

__all__ = ["reason_to_stop"]


def reason_to_stop(errors: Sequence[Errors]) -> str:
    """Why no further round is worth its simulations; empty while one is.

    A round has moved the posterior from where the one before had left it; the next one, with more to learn
    from and nearer to the answer, will move it less. If that was less than the posterior's own error, the
    larger of q's and the likelihood's, the next one cannot be told from none.

    Not so if the round's runs contradict the likelihood that they were drawn for: then its error was more
    than the ensemble shows, and whether the new likelihood is better the next round's runs tell.

    Args:
        errors: of the rounds so far.

    >>> first = Errors(q=0.01, likelihood=0.2, moved=None, q_status="ok")
    >>> second = Errors(q=0.01, likelihood=0.1, moved=0.08, q_status="ok")
    >>> reason_to_stop([first]), reason_to_stop([first, second])
    ('', 'the last round moved the posterior by 0.080, less than its own error of 0.100')
    """
    if not errors:
        return ""
    last = errors[-1]
    if last.moved is None or last.likelihood is None or last.moved >= last.own or last.contradicted:
        return ""
    return (
        f"the last round moved the posterior by {last.moved:.3f}, less than its own error of {last.own:.3f}"
    )
