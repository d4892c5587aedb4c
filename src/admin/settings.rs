//! Where the page listens and who may ask it. The rule that matters is checked here, before anything listens: an address
//! that other machines reach needs TLS, and something that tells one caller from another.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::token::Role;

/// Where the page listens, and who may ask it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Address and port of the page, the API and the metrics; port 0 takes any free one. An address that other machines can
    /// reach needs TLS, and tokens or client certificates.
    pub listen: String,
    /// Address and port that answers `/healthz` and `/readyz` alone, to anyone and without a reason; empty: they are
    /// answered at `listen` only.
    pub probe_listen: String,
    /// Names by which the page may be asked for, such as "taod.example.com", besides those of loopback and the address in
    /// `listen`. A request for another name is refused, so that no web page can point its own name here.
    pub hosts: Vec<String>,
    /// PEM file with the certificate and its chain; empty: no TLS.
    pub tls_certificate_file: PathBuf,
    /// PEM file with the certificate's private key, readable by its owner (and group) alone.
    pub tls_key_file: PathBuf,
    /// PEM file with the authorities whose client certificates are let in; a client without one is turned away. Empty: no
    /// client certificates.
    pub client_ca_file: PathBuf,
    /// What a client certificate allows: "read" (figures and prompts) or "operate" (actions too).
    pub client_role: Role,
    /// File with the hashes of the tokens that `taod admin token` makes; empty: there are none, so that on loopback the
    /// figures can be read and nothing else.
    pub token_file: PathBuf,
    /// Connections that may be open at a time, 1 to 10000; further ones wait.
    pub max_connections: usize,
    /// Size of the largest request body, in bytes, 1024 to 1048576.
    pub max_body_bytes: usize,
    /// Time for one request, in seconds, 1 to 600. Its head must come within 10 seconds.
    pub request_timeout_s: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            listen: "127.0.0.1:9464".into(),
            probe_listen: String::new(),
            hosts: Vec::new(),
            tls_certificate_file: PathBuf::new(),
            tls_key_file: PathBuf::new(),
            client_ca_file: PathBuf::new(),
            client_role: Role::Read,
            token_file: PathBuf::new(),
            max_connections: 64,
            max_body_bytes: 64 << 10,
            request_timeout_s: 30,
        }
    }
}

/// Returns the path of a setting, or nothing where it is empty.
pub(super) fn given(path: &Path) -> Option<&Path> {
    (!path.as_os_str().is_empty()).then_some(path)
}

impl Settings {
    /// Checks the values, and that nobody but this machine is answered without TLS and a proof of who asks.
    pub fn validate(&self) -> Result<(), String> {
        let address = self.address()?;
        self.probe_address()?;
        if given(&self.tls_certificate_file).is_some() != given(&self.tls_key_file).is_some() {
            return Err("tls_certificate_file and tls_key_file belong together: set both, or neither".into());
        }
        if given(&self.client_ca_file).is_some() && !self.has_tls() {
            return Err("client_ca_file needs TLS: set tls_certificate_file and tls_key_file as well".into());
        }
        for (key, value, range) in [
            ("max_connections", self.max_connections as u64, 1..=10_000),
            ("max_body_bytes", self.max_body_bytes as u64, 1 << 10..=1 << 20),
            ("request_timeout_s", self.request_timeout_s, 1..=600),
        ] {
            if !range.contains(&value) {
                return Err(format!("{key} = {value}: set it from {} to {}", range.start(), range.end()));
            }
        }
        if let Some(name) = self.hosts.iter().find(|name| !is_host_name(name)) {
            return Err(format!(
                "hosts: {name:?} is no name of a host; write one such as \"taod.example.com\", without a port"
            ));
        }
        match address.ip().is_loopback() {
            true => Ok(()),
            false => self.validate_for_others(address),
        }
    }

    /// Checks what an address needs that other machines reach.
    fn validate_for_others(&self, address: SocketAddr) -> Result<(), String> {
        let listen = &self.listen;
        let port = address.port();
        let remedy = format!("or listen on 127.0.0.1:{port}");
        if !self.has_tls() {
            return Err(format!(
                "listen {listen:?} can be reached from other machines, so it needs TLS: set tls_certificate_file and \
                 tls_key_file, {remedy}"
            ));
        }
        if given(&self.token_file).is_none() && given(&self.client_ca_file).is_none() {
            return Err(format!(
                "listen {listen:?} can be reached from other machines, so it must know who asks: set token_file (and make a \
                 token with `taod admin token`) or client_ca_file, {remedy}"
            ));
        }
        if address.ip().is_unspecified() && self.hosts.is_empty() {
            return Err(format!(
                "listen {listen:?} names no address, and hosts is empty, so every request would be refused: write the \
                 names by which the page is asked for into hosts"
            ));
        }
        Ok(())
    }

    /// Returns true where connections are encrypted.
    pub fn has_tls(&self) -> bool {
        given(&self.tls_certificate_file).is_some()
    }

    /// Returns the address of the page.
    pub fn address(&self) -> Result<SocketAddr, String> {
        parse("listen", &self.listen)
    }

    /// Returns the address of the probes' own port, where there is one.
    pub(super) fn probe_address(&self) -> Result<Option<SocketAddr>, String> {
        match self.probe_listen.as_str() {
            "" => Ok(None),
            listen => parse("probe_listen", listen).map(Some),
        }
    }
}

fn parse(key: &str, listen: &str) -> Result<SocketAddr, String> {
    listen
        .parse()
        .map_err(|_| format!("{key} {listen:?} is not an address with a port; write one such as \"127.0.0.1:9464\""))
}

fn is_host_name(name: &str) -> bool {
    let letters = |label: &str| label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
    name.parse::<IpAddr>().is_ok()
        || (!name.is_empty() && name.split('.').all(|label| !label.is_empty() && letters(label)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open() -> Settings {
        Settings { listen: "10.0.0.5:9464".into(), ..Settings::default() }
    }

    fn with_tls() -> Settings {
        Settings { tls_certificate_file: "c.pem".into(), tls_key_file: "k.pem".into(), ..open() }
    }

    #[test]
    fn an_address_that_others_reach_needs_tls_and_a_proof_of_who_asks() {
        let refuse = |settings: Settings| settings.validate().unwrap_err();
        assert!(refuse(open()).contains("needs TLS"), "{}", refuse(open()));
        assert!(refuse(with_tls()).contains("must know who asks"));
        assert!(refuse(Settings { token_file: "t.json".into(), ..open() }).contains("needs TLS"));
        for safe in [
            Settings { token_file: "t.json".into(), ..with_tls() },
            Settings { client_ca_file: "ca.pem".into(), ..with_tls() },
        ] {
            assert_eq!(safe.validate(), Ok(()));
            let anywhere = Settings { listen: "0.0.0.0:9464".into(), ..safe };
            assert!(refuse(anywhere.clone()).contains("hosts is empty"));
            assert_eq!(Settings { hosts: vec!["taod.example.com".into()], ..anywhere }.validate(), Ok(()));
        }
    }

    #[test]
    fn loopback_needs_nothing_and_what_is_half_set_is_refused() {
        let on = |listen: &str| Settings { listen: listen.into(), ..Settings::default() };
        assert_eq!(Settings::default().validate(), Ok(()));
        assert_eq!(on("[::1]:0").validate(), Ok(()));
        assert!(on("localhost").validate().unwrap_err().contains("is not an address with a port"));
        let half = Settings { tls_key_file: "k.pem".into(), ..Settings::default() };
        assert!(half.validate().unwrap_err().contains("belong together"));
        let bare = Settings { client_ca_file: "ca.pem".into(), ..Settings::default() };
        assert!(bare.validate().unwrap_err().contains("needs TLS"));
        for name in ["", "a b", "taod.example.com:443", "https://x", "a..b"] {
            assert!(Settings { hosts: vec![name.into()], ..Settings::default() }.validate().is_err(), "{name:?}");
        }
        let huge = Settings { max_body_bytes: 2 << 20, ..Settings::default() };
        assert!(huge.validate().unwrap_err().starts_with("max_body_bytes = 2097152: set it from 1024"));
    }
}
