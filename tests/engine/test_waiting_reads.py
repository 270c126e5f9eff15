"""Tests how images share the reads that may wait."""

from lazyfs.engine.fetch.waiting_reads import FEW, WaitingReads

QUEUE = 1024


def fill(waiting: WaitingReads, image: object) -> int:
    """Begin as many reads as may wait, and return how many."""
    begun = 0
    while waiting.may_wait(image):
        waiting.begin(image)
        begun += 1
    return begun


def test_an_image_alone_may_have_three_quarters() -> None:
    waiting = WaitingReads(QUEUE)
    assert fill(waiting, "a") == QUEUE * 3 // 4


def test_others_still_get_a_few_each() -> None:
    waiting = WaitingReads(QUEUE)
    fill(waiting, "a")
    assert fill(waiting, "b") == FEW
    assert fill(waiting, "a") == 0


def test_many_images_together_leave_an_eighth() -> None:
    waiting = WaitingReads(QUEUE)
    begun = sum(fill(waiting, image) for image in range(100))
    assert begun == QUEUE * 7 // 8


def test_what_ended_is_free_again() -> None:
    waiting = WaitingReads(QUEUE)
    begun = fill(waiting, "a")
    for _ in range(begun):
        waiting.end("a")
    assert fill(waiting, "b") == begun
