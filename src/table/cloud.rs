//! Object stores that are not a local disk: Amazon S3 and what speaks its language, Azure, Google Cloud.
//!
//! Credentials come from the standard environment variables of each cloud, or from the machine's role; the config names
//! only what is no secret. A commit is one conditional create, which every one of these stores has; no lock table.

use std::collections::BTreeMap;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey, S3ConditionalPut};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::{BackoffConfig, ObjectStore, RetryConfig};
use url::Url;

/// How long one request may take, its body included: a data file of 64 MiB at 1 MiB/s.
const REQUEST: &str = "60 s";
/// How long the making of a connection may take; a store that does not answer by then is not reachable.
const CONNECT: &str = "5 s";
/// Requests are repeated for this long: below the 60 s that a rebalance waits for a commit by default. What is still not
/// answered then goes back to the tables' offsets and begins anew.
const RETRY_FOR: Duration = Duration::from_secs(40);
/// And at most this often.
const RETRIES: usize = 8;

/// A cloud whose stores taod reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cloud {
    S3,
    Azure,
    Google,
}

impl Cloud {
    /// Returns whose store the scheme of a URL means.
    pub(super) fn of(scheme: &str) -> Option<Self> {
        match scheme {
            "s3" | "s3a" => Some(Cloud::S3),
            "az" | "azure" | "abfs" | "abfss" => Some(Cloud::Azure),
            "gs" => Some(Cloud::Google),
            _ => None,
        }
    }

    /// Says what is wrong with a URL and the options beside it, without reaching for anything.
    pub(super) fn check(self, url: &Url, options: &BTreeMap<String, String>) -> Result<(), String> {
        if url.host_str().is_none_or(str::is_empty) {
            return Err(format!("names no {}; write {}://NAME/FOLDER", self.bucket(), url.scheme()));
        }
        if url.password().is_some() || url.query().is_some() || url.fragment().is_some() {
            return Err("has a password, a query or a fragment: credentials go into the environment".to_owned());
        }
        options.iter().try_for_each(|(key, _)| self.check_option(key))
    }

    /// Returns the store; its `/` is the root of the bucket.
    pub(super) fn open(
        self,
        url: &Url,
        options: &BTreeMap<String, String>,
    ) -> Result<Arc<dyn ObjectStore>, object_store::Error> {
        let limits = [("timeout", REQUEST), ("connect_timeout", CONNECT)].into_iter();
        let options = limits.chain(options.iter().map(|(key, value)| (key.as_str(), value.as_str())));
        let retry = RetryConfig { backoff: BackoffConfig::default(), max_retries: RETRIES, retry_timeout: RETRY_FOR };
        Ok(match self {
            Cloud::S3 => {
                let mut builder = AmazonS3Builder::from_env();
                for (key, value) in options {
                    builder = builder.with_config(AmazonS3ConfigKey::from_str(key)?, value);
                }
                let builder = builder.with_conditional_put(S3ConditionalPut::ETagMatch);
                Arc::new(builder.with_url(url.as_str()).with_retry(retry).build()?)
            }
            Cloud::Azure => {
                let mut builder = MicrosoftAzureBuilder::from_env();
                for (key, value) in options {
                    builder = builder.with_config(AzureConfigKey::from_str(key)?, value);
                }
                Arc::new(builder.with_url(url.as_str()).with_retry(retry).build()?)
            }
            Cloud::Google => {
                let mut builder = GoogleCloudStorageBuilder::from_env();
                for (key, value) in options {
                    builder = builder.with_config(GoogleConfigKey::from_str(key)?, value);
                }
                Arc::new(builder.with_url(url.as_str()).with_retry(retry).build()?)
            }
        })
    }

    fn check_option(self, key: &str) -> Result<(), String> {
        let (name, variable) = match self {
            Cloud::S3 => (AmazonS3ConfigKey::from_str(key).map(|key| key.as_ref().to_owned()), "AWS_SECRET_ACCESS_KEY"),
            Cloud::Azure => {
                (AzureConfigKey::from_str(key).map(|key| key.as_ref().to_owned()), "AZURE_STORAGE_ACCOUNT_KEY")
            }
            Cloud::Google => {
                (GoogleConfigKey::from_str(key).map(|key| key.as_ref().to_owned()), "GOOGLE_SERVICE_ACCOUNT")
            }
        };
        match name {
            Err(_) => {
                Err(format!("has the option {key}, which is none of {self:?}'s; see object_store's {self:?} keys"))
            }
            Ok(name) if name == "aws_conditional_put" => {
                Err(format!("has the option {key}: taod decides it; leave it out"))
            }
            Ok(name) if is_secret(&name) => Err(format!(
                "has the option {key}, which is a secret: give it in the environment instead, as in {variable}"
            )),
            Ok(_) => Ok(()),
        }
    }

    fn bucket(self) -> &'static str {
        if self == Cloud::Azure { "container" } else { "bucket" }
    }
}

/// Returns true where an option of this name holds a secret itself, not the name of one.
fn is_secret(name: &str) -> bool {
    let names_one = ["_file", "_id", "_enabled"].iter().any(|end| name.ends_with(end));
    let secret = ["secret", "token", "password", "sas_key", "account_key", "access_key", "customer_key"];
    !names_one && secret.iter().any(|word| name.contains(word))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(url: &str, options: &[(&str, &str)]) -> Result<(), String> {
        let url = Url::parse(url).unwrap();
        let options = options.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        Cloud::of(url.scheme()).unwrap().check(&url, &options)
    }

    #[test]
    fn options_are_known_and_no_secrets() {
        check("s3://b/t", &[("endpoint", "http://127.0.0.1:1"), ("allow_http", "true"), ("region", "eu-1")]).unwrap();
        check("s3a://b/t", &[("access_key_id", "A"), ("sse_bucket_key_enabled", "true"), ("timeout", "9 s")]).unwrap();
        check("az://c/t", &[("account_name", "a"), ("federated_token_file", "/f")]).unwrap();
        check("gs://b", &[("google_service_account", "/path")]).unwrap();
        let secrets = [
            ("s3://b", "secret_access_key"),
            ("s3://b", "aws_session_token"),
            ("s3://b", "sse_customer_key_base64"),
            ("az://c", "account_key"),
            ("az://c", "azure_client_secret"),
            ("abfss://c@a.dfs.core.windows.net/t", "sas_token"),
            ("gs://b", "service_account_key"),
        ];
        for (url, key) in secrets {
            let refusal = check(url, &[(key, "hunter2")]).unwrap_err();
            assert!(
                refusal.contains(key) && refusal.contains("environment") && !refusal.contains("hunter2"),
                "{refusal}"
            );
        }
        assert!(check("s3://b", &[("regoin", "x")]).unwrap_err().contains("regoin"));
        assert!(check("s3://b", &[("conditional_put", "disabled")]).unwrap_err().contains("taod decides"));
    }

    #[test]
    fn a_url_names_a_bucket_and_no_credentials() {
        assert!(check("s3:///tables", &[]).unwrap_err().contains("bucket"));
        assert!(check("az:///tables", &[]).unwrap_err().contains("container"));
        assert!(check("s3://key:secret@b/t", &[]).unwrap_err().contains("environment"));
        assert!(check("s3://b/t?x=1", &[]).unwrap_err().contains("query"));
    }

    #[test]
    fn every_cloud_is_reached_by_its_own_schemes() {
        let empty = BTreeMap::new();
        let azure = BTreeMap::from([
            ("account_name".to_owned(), "a".to_owned()),
            ("skip_signature".to_owned(), "true".to_owned()),
        ]);
        for (url, options) in [
            ("s3://b/t", &empty),
            ("s3a://b/t", &empty),
            ("az://c/t", &azure),
            ("abfss://c@a.dfs.core.windows.net/t", &empty),
        ] {
            let url = Url::parse(url).unwrap();
            Cloud::of(url.scheme()).unwrap().open(&url, options).unwrap();
        }
        assert_eq!(Cloud::of("hdfs"), None);
    }
}
