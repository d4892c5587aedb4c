//! What is wrong with a broker's certificate.
//!
//! OpenSSL, through librdkafka, only says that it cannot be verified. Another TLS client that trusts the same authorities is
//! shown the same certificate and says why; what it thinks of it decides nothing.

use std::error::Error;
use std::time::Duration;

use reqwest::{Certificate, Client};

use super::Settings;

const PATIENCE: Duration = Duration::from_secs(3);

/// Returns what is wrong with the certificate that `address` (host and port) shows; `None` where that cannot be told.
/// Blocks, and must not be called on an async thread.
pub(super) fn fault(settings: &Settings, address: &str) -> Option<String> {
    let client = Client::builder().timeout(PATIENCE).no_proxy();
    let client = match authorities(settings) {
        Some(pem) => client.tls_certs_only(Certificate::from_pem_bundle(&pem.ok()?).ok()?),
        None => client,
    };
    let request = client.build().ok()?.get(format!("https://{address}/"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().ok()?;
    let error = runtime.block_on(request.send()).err()?;
    let mut causes = std::iter::successors(error.source(), |&error| error.source());
    let fault = causes
        .find_map(|cause| cause.to_string().split_once("invalid peer certificate: ").map(|(_, why)| why.to_owned()))?;
    Some(format!("the certificate of {address}: {fault}"))
}

/// Returns the authorities that are trusted, as PEM; `None` where they are this machine's.
fn authorities(settings: &Settings) -> Option<std::io::Result<Vec<u8>>> {
    let set = |key: &str| settings.properties.get(key);
    match (set("ssl.ca.pem"), set("ssl.ca.location")) {
        (Some(pem), _) => Some(Ok(pem.clone().into_bytes())),
        (None, Some(path)) => Some(std::fs::read(path)),
        (None, None) => None,
    }
}
