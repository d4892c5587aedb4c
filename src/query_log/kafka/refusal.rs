//! Why a broker and this client do not trust each other, told from librdkafka's words, and what helps.
//!
//! librdkafka tries such a connection again and again, as if it could get better by itself.

use rdkafka::error::RDKafkaErrorCode;

use super::{Settings, certificate};
use crate::query_log::SourceError;

/// Who does not accept what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// The broker: our name or password, or our token.
    Credentials,
    /// The broker: the way in which we want to prove who we are.
    Mechanism,
    /// The token endpoint: our request for a token, or it cannot be asked.
    Token,
    /// We: the broker's certificate.
    BrokerCertificate,
    /// The broker: our certificate, or that we have none.
    ClientCertificate,
    /// Either: something else about TLS.
    Tls,
}

/// An error after which trying again in the same way is of no use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refusal {
    kind: Kind,
    reason: String,
}

impl Refusal {
    /// Tells a refusal from a connection that just failed, which is `None`.
    pub(super) fn heard(code: RDKafkaErrorCode, reason: &str) -> Option<Self> {
        // A broker that wants another certificate says so after the handshake, from TLS 1.3 on: a broken connection to us.
        let alert = reason.contains("alert") && (reason.contains("certificate") || reason.contains("unknown ca"));
        let kind = match code {
            RDKafkaErrorCode::Authentication if reason.contains("Failed to acquire") => Kind::Token,
            RDKafkaErrorCode::Authentication if reason.contains("mechanism handshake failed") => Kind::Mechanism,
            RDKafkaErrorCode::Authentication => Kind::Credentials,
            RDKafkaErrorCode::SSL | RDKafkaErrorCode::BrokerTransportFailure if alert => Kind::ClientCertificate,
            RDKafkaErrorCode::SSL if reason.contains("certificate") => Kind::BrokerCertificate,
            RDKafkaErrorCode::SSL => Kind::Tls,
            _ => return None,
        };
        Some(Refusal { kind, reason: reason.to_owned() })
    }

    /// Returns the error for the operator. Asks the broker for its certificate where that is what we do not accept; blocks
    /// for as long as that takes.
    pub(super) fn error(self, settings: &Settings) -> SourceError {
        let fault = match self.kind {
            Kind::BrokerCertificate => self.address().and_then(|address| certificate::fault(settings, address)),
            _ => None,
        };
        let cause = fault.unwrap_or_else(|| self.reason.clone());
        SourceError::Refused { brokers: settings.brokers.clone(), remedy: self.remedy(&cause), cause }
    }

    fn remedy(&self, cause: &str) -> &'static str {
        match self.kind {
            Kind::Credentials if cause.contains("invalid_token") => {
                "correct the sasl.oauthbearer properties, or what the broker expects of a token (issuer, audience, scope)"
            }
            Kind::Credentials => {
                "correct sasl.username under ingest.kafka.properties and sasl.password under ingest.kafka.secret_files"
            }
            Kind::Mechanism => "set sasl.mechanism under ingest.kafka.properties to one that the broker supports",
            Kind::Token => {
                "correct sasl.oauthbearer.token.endpoint.url and sasl.oauthbearer.client.id under \
                 ingest.kafka.properties and sasl.oauthbearer.client.secret under ingest.kafka.secret_files"
            }
            Kind::BrokerCertificate if cause.to_lowercase().contains("expired") => {
                "have the broker's certificate renewed"
            }
            Kind::BrokerCertificate if cause.to_lowercase().contains("valid for name") => {
                "put a name into ingest.kafka.brokers that the broker's certificate is made out to"
            }
            Kind::BrokerCertificate => {
                "name the authority that signed the broker's certificate in ssl.ca.location under \
                 ingest.kafka.properties, or have the certificate renewed if it has expired"
            }
            Kind::ClientCertificate => {
                "name a certificate that has not expired and that the broker's authority signed in \
                 ssl.certificate.location, and its key in ssl.key.location, under ingest.kafka.properties"
            }
            Kind::Tls => "correct security.protocol and what begins with ssl. under ingest.kafka.properties",
        }
    }

    /// Returns the broker's address, as librdkafka puts it at the front: `ssl://host:port/id: ...`.
    fn address(&self) -> Option<&str> {
        Some(self.reason.split_once("://")?.1.split_once('/')?.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns what is heard of an error, as librdkafka 2.12 says it about Kafka 4.
    fn kind(code: RDKafkaErrorCode, reason: &str) -> Option<Kind> {
        Refusal::heard(code, reason).map(|refusal| refusal.kind)
    }

    #[test]
    fn refusals_are_told_from_connections_that_failed() {
        use RDKafkaErrorCode::{Authentication, BrokerTransportFailure, SSL};
        let cases = [
            (Authentication, "SASL authentication error: Authentication failed: Invalid username", Kind::Credentials),
            (Authentication, "SASL X mechanism handshake failed: Broker: Unsupported SASL mechanism", Kind::Mechanism),
            (Authentication, "Failed to acquire SASL OAUTHBEARER token: {\"error\":\"invalid_client\"}", Kind::Token),
            (SSL, "SSL handshake failed: error:0A000086::certificate verify failed: broker", Kind::BrokerCertificate),
            (SSL, "SSL handshake failed: error:0A000418:SSL routines::tlsv1 alert unknown ca", Kind::ClientCertificate),
            (SSL, "SSL handshake failed: error:0A00010B:SSL routines::wrong version number", Kind::Tls),
            (BrokerTransportFailure, "ssl/tls alert bad certificate: SSL alert number 42", Kind::ClientCertificate),
        ];
        for (code, reason, expected) in cases {
            assert_eq!(kind(code, reason), Some(expected), "{reason}");
        }
        for reason in ["Connect to ipv4#127.0.0.1:1 failed: Connection refused", "Disconnected"] {
            assert_eq!(kind(BrokerTransportFailure, reason), None);
        }
        assert_eq!(kind(RDKafkaErrorCode::AllBrokersDown, "1/1 brokers are down"), None);
    }

    #[test]
    fn the_broker_s_address_stands_at_the_front() {
        let refusal = |reason: &str| Refusal { kind: Kind::BrokerCertificate, reason: reason.to_owned() };
        assert_eq!(refusal("sasl_ssl://kafka-1:9094/bootstrap: SSL").address(), Some("kafka-1:9094"));
        assert_eq!(refusal("ssl://[::1]:9094/3: SSL handshake failed").address(), Some("[::1]:9094"));
        assert_eq!(refusal("no address").address(), None);
    }
}
