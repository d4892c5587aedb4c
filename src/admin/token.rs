//! Tokens of the page: 256 random bits each, shown once, kept as SHA-256 in one file of mode 0600.
//!
//! A plain hash is enough because a token is no password: nobody guesses 256 bits, so there is nothing for a slow hash to
//! slow down. The file is read again whenever somebody asks, so that a token that is taken out of it is refused at once.

use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use chrono::{DateTime, SubsecRound, Utc};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::durable::{self, FileError};
use crate::secret::Secret;

/// What somebody may do. The later one includes the earlier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// See everything, the text of prompts and answers too.
    Read,
    /// Change things: promote, roll back, freeze, run.
    Operate,
}

impl Role {
    /// Returns the name as it is written in the config.
    pub fn as_str(self) -> &'static str {
        match self {
            Role::Read => "read",
            Role::Operate => "operate",
        }
    }
}

/// One token, as the file holds it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Holder {
    /// Who holds it: what the records of an action name.
    pub name: String,
    pub role: Role,
    /// SHA-256 of the token, lower-case hex.
    pub sha256: String,
    pub created: DateTime<Utc>,
}

/// Why the tokens cannot be used. The message names the file and never a token.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("token file {0} can be written by others, who could let themselves in; run chmod 600 on it")]
    Writable(String),
    #[error("{0:?} has a token already; remove it first with `taod admin revoke`, or take another name")]
    Taken(String),
    #[error("{0:?} has no token; `taod admin tokens` lists who has one")]
    Unknown(String),
    #[error("{0:?} is no name for a token's holder; use 1 to 64 letters, digits, '.', '-', '_' or '@'")]
    Name(String),
}

/// The file of all tokens.
#[derive(Debug, Clone)]
pub struct Tokens {
    path: PathBuf,
}

impl Tokens {
    /// Names the file; it need not be there yet.
    pub fn at(path: &Path) -> Self {
        Tokens { path: path.to_path_buf() }
    }

    /// Returns who holds which token, in the order in which they were made; nobody where there is no file.
    pub fn list(&self) -> Result<Vec<Holder>, TokenError> {
        match durable::read_json(&self.path) {
            Err(error) if error.is_not_found() => Ok(Vec::new()),
            read => {
                let holders = read?;
                self.check_mode()?;
                Ok(holders)
            }
        }
    }

    /// Makes a token for `name` and returns it; this is the only time that it can be seen.
    pub fn make(&self, name: &str, role: Role, now: DateTime<Utc>) -> Result<Secret, TokenError> {
        if !is_name(name) {
            return Err(TokenError::Name(name.to_string()));
        }
        let mut holders = self.list()?;
        if holders.iter().any(|holder| holder.name == name) {
            return Err(TokenError::Taken(name.to_string()));
        }
        let token = format!("taod_{}", URL_SAFE_NO_PAD.encode(random()));
        let sha256 = hex::encode(digest(&token));
        holders.push(Holder { name: name.to_string(), role, sha256, created: now.trunc_subsecs(0) });
        durable::write_json(&self.path, &holders)?;
        Ok(Secret::new(token))
    }

    /// Takes the token of `name` away; whoever shows it next is refused.
    pub fn revoke(&self, name: &str) -> Result<(), TokenError> {
        let mut holders = self.list()?;
        let before = holders.len();
        holders.retain(|holder| holder.name != name);
        match holders.len() == before {
            true => Err(TokenError::Unknown(name.to_string())),
            false => Ok(durable::write_json(&self.path, &holders)?),
        }
    }

    /// Returns who holds `token`. Every hash is compared, each in a time that does not depend on where it differs.
    pub fn holder(&self, token: &str) -> Result<Option<Holder>, TokenError> {
        let shown = hex::encode(digest(token));
        let mut found = None;
        for holder in self.list()? {
            if bool::from(holder.sha256.as_bytes().ct_eq(shown.as_bytes())) {
                found = Some(holder);
            }
        }
        Ok(found)
    }

    #[cfg(unix)]
    fn check_mode(&self) -> Result<(), TokenError> {
        use std::os::unix::fs::PermissionsExt;
        let shown = || self.path.display().to_string();
        let facts = std::fs::metadata(&self.path).map_err(|e| FileError::io("cannot read", &self.path, e))?;
        match facts.permissions().mode() & 0o022 {
            0 => Ok(()),
            _ => Err(TokenError::Writable(shown())),
        }
    }

    #[cfg(not(unix))]
    fn check_mode(&self) -> Result<(), TokenError> {
        Ok(())
    }
}

/// Returns 32 bytes of the process's random source, which the operating system seeds.
pub(super) fn random() -> [u8; 32] {
    rand::random()
}

/// Returns the SHA-256 of a text.
pub(super) fn digest(text: &str) -> [u8; 32] {
    Sha256::digest(text.as_bytes()).into()
}

fn is_name(name: &str) -> bool {
    let fits = |c: char| c.is_ascii_alphanumeric() || ".-_@".contains(c);
    (1..=64).contains(&name.len()) && name.chars().all(fits)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn tokens() -> (tempfile::TempDir, Tokens) {
        let folder = tempfile::tempdir().unwrap();
        let tokens = Tokens::at(&folder.path().join("tokens.json"));
        (folder, tokens)
    }

    #[test]
    fn a_token_is_known_until_it_is_revoked_and_the_file_holds_only_its_hash() {
        let (_folder, tokens) = tokens();
        let now = Utc::now();
        let (anna, bob) =
            (tokens.make("anna", Role::Operate, now).unwrap(), tokens.make("bob", Role::Read, now).unwrap());
        assert_eq!(
            tokens.holder(anna.expose()).unwrap().map(|h| (h.name, h.role)),
            Some(("anna".into(), Role::Operate))
        );
        assert_eq!(tokens.holder(bob.expose()).unwrap().map(|h| h.role), Some(Role::Read));
        let text = std::fs::read_to_string(&tokens.path).unwrap();
        assert!(!text.contains(anna.expose()) && !text.contains(&anna.expose()[5..]), "{text}");
        assert!(text.contains(&hex::encode(Sha256::digest(anna.expose()))));
        for wrong in ["", "taod_", &anna.expose()[..anna.expose().len() - 1], &format!("{} ", anna.expose())] {
            assert_eq!(tokens.holder(wrong).unwrap(), None, "{wrong:?}");
        }
        tokens.revoke("anna").unwrap();
        assert_eq!(tokens.holder(anna.expose()).unwrap(), None);
        assert!(matches!(tokens.revoke("anna"), Err(TokenError::Unknown(_))));
    }

    #[test]
    fn tokens_differ_and_have_256_bits() {
        let (_folder, tokens) = tokens();
        let make = |name: &str| tokens.make(name, Role::Read, Utc::now()).unwrap();
        let (a, b) = (make("a"), make("b"));
        assert_ne!(a, b);
        assert_eq!(URL_SAFE_NO_PAD.decode(&a.expose()[5..]).unwrap().len(), 32);
        assert!(matches!(tokens.make("a", Role::Read, Utc::now()), Err(TokenError::Taken(_))));
        for name in ["", "a b", "a\nb", "<b>", &"x".repeat(65)] {
            assert!(matches!(tokens.make(name, Role::Read, Utc::now()), Err(TokenError::Name(_))), "{name:?}");
        }
    }

    #[test]
    fn the_file_is_for_its_owner_alone_and_one_that_others_write_is_refused() {
        let (_folder, tokens) = tokens();
        let token = tokens.make("a", Role::Read, Utc::now()).unwrap();
        let mode = std::fs::metadata(&tokens.path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        std::fs::set_permissions(&tokens.path, std::fs::Permissions::from_mode(0o620)).unwrap();
        assert!(matches!(tokens.holder(token.expose()), Err(TokenError::Writable(_))));
    }

    #[test]
    fn the_later_role_includes_the_earlier() {
        assert!(Role::Operate > Role::Read);
    }
}
