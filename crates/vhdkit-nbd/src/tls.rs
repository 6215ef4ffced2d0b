//! Certificates and keys, and the TLS handshake.

use std::error::Error;
use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;

use rustix::net::RecvFlags;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection};

use crate::channel::Stream;

/// What went wrong with a certificate, a key, or what they make together.
#[derive(Debug)]
pub struct TlsError {
    message: String,
    source: Option<Box<dyn Error + Send + Sync>>,
}

impl TlsError {
    fn new(message: impl Into<String>, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { message: message.into(), source: Some(source.into()) }
    }
}

impl fmt::Display for TlsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.source {
            Some(source) => write!(f, "{}: {source}", self.message),
            None => f.write_str(&self.message),
        }
    }
}

impl Error for TlsError {}

/// How a server proves who it is, and whom it believes.
#[derive(Clone, Debug)]
pub struct Tls {
    config: Arc<ServerConfig>,
    required: bool,
    verifies_clients: bool,
}

impl Tls {
    /// From PEM files: the certificate with those that lead to its root, its key, and, where clients have to prove who
    /// they are, the certificates of whoever signs theirs. TLS is required of every client; see [`Tls::optional`].
    ///
    /// # Errors
    /// [`TlsError`] when a file cannot be read, holds no such thing, or the key is not the certificate's.
    pub fn from_files(certificate: &Path, key: &Path, client_ca: Option<&Path>) -> Result<Self, TlsError> {
        let shown = |path: &Path| path.display().to_string();
        let certificates = certificates(certificate)?;
        let key = PrivateKeyDer::from_pem_file(key)
            .map_err(|error| TlsError::new(format!("{}: cannot read the private key", shown(key)), error))?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| TlsError::new("cannot set TLS up", error))?;
        let builder = match client_ca {
            None => builder.with_no_client_auth(),
            Some(path) => {
                let mut roots = RootCertStore::empty();
                for certificate in self::certificates(path)? {
                    let added = roots.add(certificate);
                    added.map_err(|error| TlsError::new(format!("{}: not fit to sign clients", shown(path)), error))?;
                }
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
                let verifier = verifier
                    .map_err(|error| TlsError::new(format!("{}: cannot verify clients with it", shown(path)), error))?;
                builder.with_client_cert_verifier(verifier)
            }
        };
        let config = builder
            .with_single_cert(certificates, key)
            .map_err(|error| TlsError::new("certificate and key do not go together", error))?;
        Ok(Self { config: Arc::new(config), required: true, verifies_clients: client_ca.is_some() })
    }

    /// Serves clients without TLS too.
    #[must_use]
    pub fn optional(mut self) -> Self {
        self.required = false;
        self
    }

    pub(crate) fn is_required(&self) -> bool {
        self.required
    }

    /// Whether only clients are served that prove who they are.
    #[must_use]
    pub fn verifies_clients(&self) -> bool {
        self.verifies_clients && self.required
    }

    /// Does the TLS handshake, within the timeouts that the socket has; `is_late` ends it in any case.
    pub(crate) fn accept(&self, stream: &Stream, is_late: &dyn Fn() -> bool) -> io::Result<ServerConnection> {
        let mut connection = ServerConnection::new(Arc::clone(&self.config)).map_err(io::Error::other)?;
        connection.set_buffer_limit(None); // what is put in is taken out at once
        let mut bytes = [0; 4096];
        while connection.is_handshaking() || connection.wants_write() {
            if is_late() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            if connection.wants_write() {
                let mut encoded = Vec::new();
                connection.write_tls(&mut encoded)?;
                stream.send_all(&encoded)?;
                continue;
            }
            let count = stream.receive(&mut bytes, RecvFlags::empty())?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let mut received = bytes.get(..count).unwrap_or_default();
            while !received.is_empty() {
                connection.read_tls(&mut received)?;
                if let Err(error) = connection.process_new_packets() {
                    let mut alert = Vec::new();
                    let _ = connection.write_tls(&mut alert); // tells the client why, if it still listens
                    let _ = stream.send_all(&alert);
                    return Err(io::Error::other(error));
                }
            }
        }
        Ok(connection)
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let failed = |error| TlsError::new(format!("{}: cannot read the certificate", path.display()), error);
    let found = CertificateDer::pem_file_iter(path).map_err(failed)?.collect::<Result<Vec<_>, _>>().map_err(failed)?;
    if found.is_empty() {
        let message = format!("{}: there is no certificate in it", path.display());
        return Err(TlsError { message, source: None });
    }
    Ok(found)
}
