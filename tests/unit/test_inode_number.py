"""Inode numbers: every one leads back to its image or folder, in any process."""

from hypothesis import given
from hypothesis import strategies as st

from lazyfs.core import inode_number

KEYS = st.integers(2, 1 << 48)


@given(KEYS)
def test_both_numbers_of_an_image_lead_to_its_key(key: int) -> None:
    whole = inode_number.whole(key)
    assert whole != key
    assert inode_number.key(key) == inode_number.key(whole) == key
    assert inode_number.is_whole(whole)
    assert not inode_number.is_whole(key)
    assert whole < 1 << 63, "st_ino is signed in many a program"


@given(st.text(max_size=40), KEYS)
def test_a_folder_is_never_taken_for_an_image(path: str, key: int) -> None:
    folder = inode_number.folder(path)
    assert folder == inode_number.folder(path)
    assert not inode_number.is_whole(folder)
    assert inode_number.key(folder) == folder
    assert folder not in (inode_number.ROOT, key, inode_number.whole(key))
    assert folder < 1 << 63
