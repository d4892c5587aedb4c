//! Signatures of versions: made when one is registered, asked for whenever one is loaded.
//!
//! What is signed is `manifest.json` byte for byte: it holds the hash of every file, and the lineage. The signature is
//! written before the manifest, so that a version that exists has it. A server that is given folders and has no registry asks
//! for the same by [`check_folder`].

use std::fs;
use std::path::{Path, PathBuf};

use super::manifest::is_version;
use super::{MANIFEST, Manifest, Registry, RegistryError, disk};
use crate::durable::{self, FileError};
use crate::signature::{PublicKey, Signature, SigningKey, Statement};

/// Name of the file in a version's folder.
const SIGNATURE: &str = "manifest.sig";

impl Registry {
    /// Signs a version that is registered already, after its files are found to be what was registered. Whether they are
    /// what they should be is the word of who calls this.
    pub fn sign(&self, version: &str) -> Result<PublicKey, RegistryError> {
        let _lock = self.lock()?;
        let manifest = self.manifest(version)?;
        manifest.check_name(version)?;
        manifest.check_files(&self.path(version))?;
        let bytes = self.manifest_bytes(version)?;
        let key = SigningKey::read(&self.settings.signing_key_file)?;
        self.write_checked(version, &key.sign(Statement::Adapter, &bytes)?, &bytes)?;
        durable::admit_group(&self.path(version).join(MANIFEST), 0o040)?;
        Ok(key.public())
    }

    /// Returns by which key a version is signed, where it is; whether that key is trusted is another question.
    pub fn signer(&self, version: &str) -> Result<Option<String>, RegistryError> {
        match durable::read_json::<Signature>(&self.signature_path(version)) {
            Err(error) if error.is_not_found() => Ok(None),
            read => Ok(Some(read?.key)),
        }
    }

    /// Signs the manifest that is about to be written, where there is a key.
    pub(super) fn write_signature(&self, manifest: &Manifest) -> Result<(), RegistryError> {
        if self.settings.signing_key_file.as_os_str().is_empty() {
            return Ok(());
        }
        let bytes = durable::json_bytes(&self.path(&manifest.version).join(MANIFEST), manifest)?;
        let key = SigningKey::read(&self.settings.signing_key_file)?;
        self.write_checked(&manifest.version, &key.sign(Statement::Adapter, &bytes)?, &bytes)
    }

    /// Writes a signature unless it would not count here: a version by a key that is not trusted could never be loaded.
    fn write_checked(&self, version: &str, signature: &Signature, manifest: &[u8]) -> Result<(), RegistryError> {
        let trusted = self.trusted()?;
        if !trusted.is_empty() {
            signature.check(Statement::Adapter, manifest, &trusted, &named(version))?;
        }
        let path = self.signature_path(version);
        disk::write_json(&path, signature)?;
        // A server that asks for signatures reads it as it reads the adapter.
        Ok(durable::admit_group(&path, 0o040)?)
    }

    /// Refuses a version that none of the trusted keys signed, where there are any.
    pub(super) fn check_signature(&self, manifest: &Manifest) -> Result<(), RegistryError> {
        let (trusted, what) = (self.trusted()?, named(&manifest.version));
        if trusted.is_empty() {
            return Ok(());
        }
        let signed = signed_manifest(&self.path(&manifest.version), &trusted, &what)?;
        // What was parsed before is what was signed, also where somebody writes between the two.
        match signed == *manifest {
            true => Ok(()),
            false => Err(RegistryError::Manifest {
                version: manifest.version.clone(),
                why: "it changed while it was read".to_owned(),
            }),
        }
    }

    fn trusted(&self) -> Result<Vec<PublicKey>, RegistryError> {
        Ok(PublicKey::parse_all(&self.settings.trusted_keys)?)
    }

    fn manifest_bytes(&self, version: &str) -> Result<Vec<u8>, RegistryError> {
        let path = self.path(version).join(MANIFEST);
        Ok(fs::read(&path).map_err(|e| FileError::io("cannot read", &path, e))?)
    }

    fn signature_path(&self, version: &str) -> PathBuf {
        self.path(version).join(SIGNATURE)
    }
}

/// Refuses a folder whose files are not what one of `trusted` signed as one version. `names` are those by which the folder is
/// asked for: where one is a version's, it must be this version's.
pub fn check_folder(folder: &Path, names: &[&str], trusted: &[PublicKey]) -> Result<(), RegistryError> {
    let what = format!("the adapter in {}", folder.display());
    let manifest = signed_manifest(folder, trusted, &what)?;
    for name in names.iter().filter(|name| is_version(name)) {
        manifest.check_name(name)?;
    }
    manifest.check_files(folder)
}

/// Reads a folder's manifest, if one of `trusted` signed it.
fn signed_manifest(folder: &Path, trusted: &[PublicKey], what: &str) -> Result<Manifest, RegistryError> {
    let signature = Signature::read(&folder.join(SIGNATURE), Statement::Adapter, what)?;
    let path = folder.join(MANIFEST);
    let bytes = fs::read(&path).map_err(|e| FileError::io("cannot read", &path, e))?;
    signature.check(Statement::Adapter, &bytes, trusted, what)?;
    serde_json::from_slice(&bytes)
        .map_err(|e| RegistryError::Manifest { version: what.to_owned(), why: format!("it cannot be read: {e}") })
}

fn named(version: &str) -> String {
    format!("version {version}")
}
