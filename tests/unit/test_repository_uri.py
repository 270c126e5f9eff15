"""Which URIs lead to the same repository, and which ones lazyfs refuses."""

import pytest

from lazyfs.core import repository_uri

X509 = "tls-certificates=/etc/pki"
PSK = "tls-psk-file=/etc/keys"


def identity(uri: str) -> str:
    return repository_uri.parse(uri).identity


@pytest.mark.parametrize(
    ("uri", "same"),
    [
        ("nbd://Images.Example.com", "nbd://images.example.com:10809"),
        ("nbd://images.example.com/", "nbd://images.example.com:10809"),
        (f"nbds://alice@images.example.com?{PSK}", "nbd://images.example.com"),
        ("nbd://[FE80::1]:10809", "nbd://[fe80::1]"),
        ("nbd+unix:///?socket=/run/a%20b", "nbd+unix:///?socket=/run/a b"),
        (f"nbds+unix://bob@/?socket=/run/s&{PSK}", "nbd+unix:///?socket=/run/s"),
        ("nbd+vsock://2:99", f"nbds+vsock://bob@2:99?{PSK}"),
    ],
)
def test_the_same(uri: str, same: str) -> None:
    assert identity(uri) == identity(same)


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


def test_all_parts() -> None:
    uri = repository_uri.parse("nbds://a%40b@[::1]:7/?tls-psk-file=/etc/my%20keys")
    assert (uri.tls, uri.transport, uri.host, uri.port) == (True, "tcp", "::1", 7)
    assert (uri.user, uri.psk_file, uri.certificates) == ("a@b", "/etc/my keys", "")
    assert repository_uri.parse("nbd+unix:///?socket=/run/%ff").socket == "/run/\udcff"
    assert repository_uri.parse("nbd+unix:///?socket=/run/a+b").socket == "/run/a+b"
    assert repository_uri.parse("nbd://Host").host == "Host", "a certificate may be compared"


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("http://h", "not an NBD URI"),
        ("nbd+ssh://-oProxyCommand=x", "not an NBD URI"),
        ("nbd://h/disk", "names one export; give the server alone: nbd://h"),
        ("nbd://", "names no host"),
        ("nbd://h:99999", "port"),
        ("nbd://h:x", "port"),
        ("nbd+vsock://h", "by its number, such as nbd\\+vsock://2"),
        ("nbd+unix:///?socket=run/s", "absolute path"),
        ("nbd+unix://", "absolute path"),
        ("nbd://alice:secret@h", "password"),
        ("nbd://h?x=/x", "'x'; there are socket, tls-certificates, tls-psk-file"),
        ("nbd://h?sockett=/x", "'sockett'; did you mean socket"),
        ("nbd://h?socket=/x", "which is for nbd\\+unix://"),
        ("nbd://h?tls-certificates=", "without a value"),
        ("nbd://h#x", "has a #"),
        ("nbd://h%00x", "has a %00"),
        ("nbds://h?tls-certificates=/a%00", "has a %00"),
        ("nbd:unix:/run/s", "not an NBD URI"),
        ("nbd://disk1/disk", "give the server alone: nbd://disk1$"),
        (f"nbds://h?{X509}&tls-verify-peer=false", "tls-verify-peer"),
        (f"nbds://h?{X509}&{X509}", "twice"),
        ("nbds://h", "either tls-certificates=FOLDER"),
        ("nbds+unix:///?socket=/s", "needs tls-psk-file"),
        (f"nbds://a@h?{X509}&{PSK}", "give one of them"),
        ("nbds://h?tls-certificates=pki", "absolute path"),
        (f"nbds://h?{PSK}", "nbds://USER@"),
        (f"nbd://h?{X509}", "not encrypted; write nbds://"),
        (f"nbd+unix:///?socket=/s&{PSK}", "not encrypted; write nbds\\+unix://"),
        (f"nbds+unix:///?socket=/s&{X509}", "no host name .* use tls-psk-file"),
        (f"nbds+vsock://2?{X509}", "no host name .* use tls-psk-file"),
    ],
)
def test_refused(uri: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        repository_uri.parse(uri)
    assert "secret" not in str(refused.value)
