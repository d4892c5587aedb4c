//! The rules: one line a kind. Formats are those that the issuers document or that their scanners publish.

use super::checks::{any, card, dense, iban, password, phone, random, ssn};

/// Raised with every change of a rule, so that prompts that were placed before are looked through again.
pub(in crate::dataset) const VERSION: i64 = 2;

/// One kind of what must not train.
pub(super) struct Rule {
    pub(super) kind: &'static str,
    pub(super) pattern: &'static str,
    /// Judges the first group of a match, or the match where there is no group.
    pub(super) check: fn(&str) -> bool,
}

const fn rule(kind: &'static str, pattern: &'static str, check: fn(&str) -> bool) -> Rule {
    Rule { kind, pattern, check }
}

/// Secrets first, personal data last.
pub(super) const RULES: [Rule; 39] = [
    rule("aws_access_key", r"\b((?:AKIA|ASIA|ABIA|ACCA)[A-Z2-7]{16})\b", any),
    rule(
        "aws_secret_key",
        r#"(?i)(?:aws|secret_access|secretaccess)[\w.\- ]{0,30}["']?\s*[:=]\s*["']?([a-z0-9/+]{40})(?:[^a-z0-9/+=]|$)"#,
        random,
    ),
    rule("azure_storage_key", r"(?i)AccountKey=([A-Za-z0-9+/]{86}==)", any),
    rule("azure_client_secret", r"\b([A-Za-z0-9_~.-]{3}[78]Q~[A-Za-z0-9_~.-]{31,34})", random),
    rule("google_api_key", r"\b(AIza[A-Za-z0-9_-]{35})(?:[^A-Za-z0-9_-]|$)", any),
    rule("google_oauth_secret", r"\b(GOCSPX-[A-Za-z0-9_-]{28})(?:[^A-Za-z0-9_-]|$)", any),
    rule("github_token", r"\b(gh[pousr]_[A-Za-z0-9]{36,251})\b", random),
    rule("github_fine_grained_token", r"\b(github_pat_[A-Za-z0-9_]{82})\b", random),
    rule("gitlab_token", r"\b(gl(?:pat|ptt|dt|rt|cbt|oas|soat|agent)-[A-Za-z0-9_-]{20,})", random),
    rule("slack_token", r"\b(xox[abeoprs]-[A-Za-z0-9-]{20,})", random),
    rule(
        "slack_webhook",
        r"hooks\.slack\.com/(?:services|workflows|triggers)/(T[A-Z0-9]{8,}/[A-Z0-9]{8,}/[A-Za-z0-9]{20,})",
        any,
    ),
    rule("discord_webhook", r"discord(?:app)?\.com/api/webhooks/(\d{17,20}/[A-Za-z0-9_-]{60,})", any),
    rule("discord_token", r"\b([MNO][A-Za-z0-9_-]{23,27}\.[A-Za-z0-9_-]{6}\.[A-Za-z0-9_-]{27,40})", random),
    rule("telegram_token", r"\b(\d{8,10}:AA[A-Za-z0-9_-]{33})(?:[^A-Za-z0-9_-]|$)", any),
    rule("stripe_key", r"\b([rs]k_(?:live|test|prod)_[A-Za-z0-9]{16,})\b", random),
    rule("square_token", r"\b(sq0(?:atp|csp|idp)-[A-Za-z0-9_-]{22,43})", random),
    rule("shopify_token", r"\b(shp(?:at|ca|pa|ss)_[0-9a-fA-F]{32})\b", any),
    rule("openai_key", r"\b(sk-(?:proj-|svcacct-|admin-|None-)?[A-Za-z0-9_-]{32,})", openai),
    rule("anthropic_key", r"\b(sk-ant-[a-z0-9]{3,10}-[A-Za-z0-9_-]{80,})", any),
    rule("huggingface_token", r"\b(hf_[A-Za-z0-9]{34,})\b", random),
    rule("databricks_token", r"\b(dapi[0-9a-f]{32}(?:-\d)?)\b", any),
    rule("npm_token", r"\b(npm_[A-Za-z0-9]{36})\b", random),
    rule("pypi_token", r"\b(pypi-AgEI[A-Za-z0-9_-]{60,})", any),
    rule("dockerhub_token", r"\b(dckr_(?:pat|oat)_[A-Za-z0-9_-]{27,})", random),
    rule("sendgrid_key", r"\b(SG\.[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43})", any),
    rule("twilio_key", r"\b(SK[0-9a-f]{32})\b", any),
    rule("mailgun_key", r"\b(key-[0-9a-f]{32})\b", any),
    rule("digitalocean_token", r"\b(do[opr]_v1_[0-9a-f]{64})\b", any),
    rule("vault_token", r"\b(hv[sbr]\.[A-Za-z0-9_-]{24,})", random),
    rule("age_secret_key", r"\b(AGE-SECRET-KEY-1[0-9A-Z]{58})\b", any),
    rule("private_key", r"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----", any),
    rule("jwt", r"\b(eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{20,})", any),
    rule("url_password", r"\b[a-zA-Z][a-zA-Z0-9+.-]{2,15}://[^\s:/@?#]{1,64}:([^\s:/@]{4,128})@[^\s/@]", password),
    rule(
        "assigned_secret",
        r#"(?i)(?:api[_-]?key|access[_-]?key|auth[_-]?token|access[_-]?token|client[_-]?secret|secret[_-]?key|private[_-]?key|passw(?:or)?d|secret|token|bearer)["']?(?:\s*(?:[:=]|=>|:=)\s*|\s+)["'`]?([a-z0-9_\-/+=.~!@#$%^&*]{12,200})"#,
        dense,
    ),
    rule("email", r"\b([A-Za-z0-9][A-Za-z0-9._%+-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.){1,4}[A-Za-z]{2,18})\b", any),
    rule(
        "phone",
        r"(?:^|[^\w.+/-])(\+?(?:\d{1,3}[ .-]?)?(?:\(\d{1,5}\)[ .-]?)?\d{2,8}(?:[ .-]\d{2,8}){1,4}|\+\d{8,15})(?:[^\w-]|$)",
        phone,
    ),
    rule("iban", r"\b([A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?)\b", iban),
    rule("card", r"\b((?:\d[ -]?){12,18}\d)\b", card),
    rule("us_ssn", r"\b(\d{3}-\d{2}-\d{4})\b", ssn),
];

fn openai(value: &str) -> bool {
    !value.starts_with("sk-ant-") && random(value)
}
