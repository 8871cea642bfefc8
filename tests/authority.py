"""A market's certificate authority, for a test: a CA, and certificates whose common name says who somebody is."""

import datetime as dt
import ipaddress

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from agent.demo.market import written

DAY = dt.timedelta(days=1)


class Authority:
    """`Authority(folder)` writes `ca.crt`; `issue(name)` writes `name.crt` and `name.key` (0600) and returns their paths."""

    def __init__(self, folder, name="the market"):
        self._folder, self._key = folder, ec.generate_private_key(ec.SECP256R1())
        self._name = self._named(name)
        ca = self._builder(self._name, self._key.public_key(), is_authority=True).sign(
            self._key, hashes.SHA256()
        )
        self.file = written(folder / "ca.crt", _pem(ca).decode())

    def issue(self, common_name, *, host=None):
        """A certificate for somebody; with `host` (an IP address) for a broker that is reached there."""
        key = ec.generate_private_key(ec.SECP256R1())
        builder = self._builder(self._named(common_name), key.public_key(), is_authority=False)
        if host is not None:
            names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(host))])
            builder = builder.add_extension(names, critical=False)
        certificate = builder.sign(self._key, hashes.SHA256())
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return (
            written(self._folder / f"{common_name}.crt", _pem(certificate).decode()),
            written(self._folder / f"{common_name}.key", private.decode(), mode=0o600),
        )

    def _builder(self, name, public_key, *, is_authority):
        now = dt.datetime.now(dt.UTC)
        builder = x509.CertificateBuilder().subject_name(name).issuer_name(self._name).public_key(public_key)
        builder = builder.serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now - DAY).not_valid_after(now + DAY)
        builder = builder.add_extension(x509.BasicConstraints(is_authority, None), critical=True)
        ours = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        return builder.add_extension(
            x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False
        ).add_extension(ours, critical=False)

    @staticmethod
    def _named(common_name):
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _pem(certificate):
    return certificate.public_bytes(serialization.Encoding.PEM)
