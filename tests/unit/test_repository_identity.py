"""Which URIs lead to the same repository."""

import pytest

from lazyfs.core.repository_identity import identity


@pytest.mark.parametrize(
    ("uri", "same"),
    [
        ("nbd://Images.Example.com", "nbd://images.example.com:10809"),
        ("nbd://images.example.com/", "nbd://images.example.com:10809"),
        ("nbds://alice:secret@images.example.com?tls-psk-file=/etc/keys", "nbd://images.example.com"),
        ("nbd://[FE80::1]:10809", "nbd://[fe80::1]"),
        ("nbd+unix:///?socket=/run/a%20b", "nbd+unix:///?socket=/run/a b"),
        ("nbds+unix:///?socket=/run/s&tls-certificates=/etc/x", "nbd+unix:///?socket=/run/s"),
        ("nbd+vsock://2:99", "nbds+vsock://2:99"),
    ],
)  # fmt: skip
def test_the_same(uri: str, same: str) -> None:
    assert identity(uri) == identity(same)
    assert "secret" not in identity(uri)


@pytest.mark.parametrize(
    ("uri", "other"),
    [
        ("nbd://a.example.com", "nbd://b.example.com"),
        ("nbd://a.example.com", "nbd://a.example.com:10810"),
        ("nbd+unix:///?socket=/run/a", "nbd+unix:///?socket=/run/b"),
        ("nbd+vsock://2", "nbd://2"),
    ],
)
def test_another(uri: str, other: str) -> None:
    assert identity(uri) != identity(other)
