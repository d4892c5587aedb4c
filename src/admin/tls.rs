//! TLS of the page: its own certificate, and where the operator wants it, certificates of clients.

use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use tokio_rustls::TlsAcceptor;

use super::settings::{Settings, given};

/// Returns what takes TLS connections, or nothing where the settings ask for none. An error names the key and the file.
pub(super) fn acceptor(settings: &Settings) -> Result<Option<TlsAcceptor>, String> {
    let Some(certificate) = given(&settings.tls_certificate_file) else { return Ok(None) };
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let versions = ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|e| format!("tls: {e}"))?;
    let clients = match given(&settings.client_ca_file) {
        None => versions.with_no_client_auth(),
        Some(file) => {
            let mut roots = RootCertStore::empty();
            for authority in certificates("client_ca_file", file)? {
                roots.add(authority).map_err(|e| format!("client_ca_file {}: {e}", file.display()))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
            versions.with_client_cert_verifier(verifier.map_err(|e| format!("client_ca_file {}: {e}", file.display()))?)
        }
    };
    let key = private_key(&settings.tls_key_file)?;
    let mut config = clients
        .with_single_cert(certificates("tls_certificate_file", certificate)?, key)
        .map_err(|e| format!("tls_certificate_file {} and tls_key_file: {e}", certificate.display()))?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Some(TlsAcceptor::from(Arc::new(config))))
}

fn certificates(key: &str, file: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let fail = |e| format!("{key} {}: {e}; give a PEM file with a certificate", file.display());
    let found: Vec<_> = CertificateDer::pem_file_iter(file).map_err(fail)?.collect::<Result<_, _>>().map_err(fail)?;
    match found.is_empty() {
        true => Err(format!("{key} {} holds no certificate; give a PEM file with one", file.display())),
        false => Ok(found),
    }
}

fn private_key(file: &Path) -> Result<PrivateKeyDer<'static>, String> {
    let shown = file.display();
    let key = PrivateKeyDer::from_pem_file(file)
        .map_err(|e| format!("tls_key_file {shown}: {e}; give a PEM file with the certificate's private key"))?;
    match others_can_read(file) {
        true => Err(format!("tls_key_file {shown} can be read by every user; run chmod o= on it")),
        false => Ok(key),
    }
}

#[cfg(unix)]
fn others_can_read(file: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    std::fs::metadata(file).is_ok_and(|facts| facts.permissions().mode() & 0o007 != 0)
}

#[cfg(not(unix))]
fn others_can_read(_file: &Path) -> bool {
    false
}
