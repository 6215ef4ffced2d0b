//! Certificates for tests, and the client's side of TLS.
//!
//! The files in `tests/certificates` were made with `openssl`: `ca` signed `server` (for `localhost`) and `client`, and
//! nobody signed `other`. The key of `ca` was thrown away; the others guard nothing.

use std::io::{self, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use vhdkit_nbd::Tls;
use vhdkit_testkit::nbd::{Fault, Handshake};

pub(crate) type TlsStream = StreamOwned<ClientConnection, UnixStream>;

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/certificates").join(name)
}

/// The server's side; with `verify`, clients have to prove who they are.
pub(crate) fn server(verify: bool) -> Tls {
    let authority = file("ca.pem");
    Tls::from_files(&file("server.pem"), &file("server.key"), verify.then_some(authority.as_path())).unwrap()
}

/// TLS over a stream, with the certificate of that name, if any.
pub(crate) fn wrap(stream: UnixStream, certificate: Option<&str>) -> io::Result<TlsStream> {
    wrap_saying(stream, certificate, b"")
}

/// The same with words that go together with the last message of the handshake.
pub(crate) fn wrap_saying(stream: UnixStream, certificate: Option<&str>, words: &[u8]) -> io::Result<TlsStream> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(file("ca.pem")).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let builder = builder.with_root_certificates(roots);
    let config = match certificate {
        None => builder.with_no_client_auth(),
        Some(name) => {
            let chain = vec![CertificateDer::from_pem_file(file(&format!("{name}.pem"))).unwrap()];
            let key = PrivateKeyDer::from_pem_file(file(&format!("{name}.key"))).unwrap();
            builder.with_client_auth_cert(chain, key).unwrap()
        }
    };
    let name = ServerName::try_from("localhost").unwrap();
    let connection = ClientConnection::new(Arc::new(config), name).map_err(io::Error::other)?;
    let mut stream = StreamOwned::new(connection, stream);
    stream.conn.writer().write_all(words)?;
    while stream.conn.is_handshaking() {
        stream.conn.complete_io(&mut stream.sock)?;
    }
    Ok(stream)
}

/// STARTTLS and the TLS handshake.
pub(crate) fn upgrade(
    mut handshake: Handshake<UnixStream>,
    certificate: Option<&str>,
) -> Result<Handshake<TlsStream>, Fault> {
    handshake.starttls()?;
    handshake.upgrade(|stream| wrap(stream, certificate))
}
