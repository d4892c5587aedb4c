//! Recall and precision on a generated set, and on real prompts that hold nothing.

use std::collections::BTreeMap;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;

const BASE62: &str = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";
const URL: &str = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
const HEX: &str = "0123456789abcdef";

/// Draws what issuers issue. It shares nothing with the patterns.
struct Issuer(ChaCha8Rng);

impl Issuer {
    fn of(&mut self, alphabet: &str, n: usize) -> String {
        let letters: Vec<char> = alphabet.chars().collect();
        (0..n).map(|_| letters[self.0.random_range(0..letters.len())]).collect()
    }

    fn digits(&mut self, n: usize) -> String {
        self.of("0123456789", n)
    }

    /// Digits after a prefix, so that Luhn's sum holds.
    fn card(&mut self, prefix: &str, n: usize) -> String {
        let start = format!("{prefix}{}", self.digits(n - 1 - prefix.len()));
        let sum: u32 = start
            .chars()
            .rev()
            .enumerate()
            .map(|(i, c)| {
                let digit = c.to_digit(10).unwrap();
                if i % 2 == 0 { digit * 2 / 10 + digit * 2 % 10 } else { digit }
            })
            .sum();
        format!("{start}{}", (10 - sum % 10) % 10)
    }

    fn iban(&mut self) -> String {
        let account = self.digits(18);
        // DE becomes 13 14.
        let number: u128 = format!("{account}131400").parse().unwrap();
        format!("DE{:02}{account}", 98 - number % 97)
    }

    fn secret(&mut self, kind: &str) -> String {
        match kind {
            "aws_access_key" => format!("AKIA{}", self.of("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", 16)),
            "aws_secret_key" => format!("aws_secret_access_key = {}", self.of(&format!("{BASE62}/+"), 40)),
            "azure_storage_key" => format!("AccountName=a;AccountKey={}==", self.of(&format!("{BASE62}/+"), 86)),
            "azure_client_secret" => format!("{}8Q~{}", self.of(BASE62, 3), self.of(&format!("{BASE62}_~.-"), 34)),
            "google_api_key" => format!("AIza{}", self.of(URL, 35)),
            "google_oauth_secret" => format!("GOCSPX-{}", self.of(URL, 28)),
            "github_token" => format!("gh{}_{}", self.of("pousr", 1), self.of(BASE62, 36)),
            "github_fine_grained_token" => format!("github_pat_{}_{}", self.of(BASE62, 22), self.of(BASE62, 59)),
            "gitlab_token" => format!("glpat-{}", self.of(URL, 20)),
            "slack_token" => format!("xoxb-{}-{}-{}", self.digits(12), self.digits(13), self.of(BASE62, 24)),
            "slack_webhook" => {
                let upper = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789";
                let parts = (self.of(upper, 8), self.of(upper, 10), self.of(BASE62, 24));
                format!("https://hooks.slack.com/services/T{}/B{}/{}", parts.0, parts.1, parts.2)
            }
            "discord_webhook" => format!("https://discord.com/api/webhooks/{}/{}", self.digits(18), self.of(URL, 68)),
            "discord_token" => format!("M{}.{}.{}", self.of(BASE62, 25), self.of(URL, 6), self.of(BASE62, 38)),
            "telegram_token" => {
                format!("{}:AA{}", 100_000_000 + self.0.random_range(0..900_000_000u64), self.of(URL, 33))
            }
            "stripe_key" => format!("sk_live_{}", self.of(BASE62, 24)),
            "square_token" => format!("sq0atp-{}", self.of(URL, 22)),
            "shopify_token" => format!("shpat_{}", self.of(HEX, 32)),
            "openai_key" => format!("sk-proj-{}T3BlbkFJ{}", self.of(BASE62, 20), self.of(BASE62, 20)),
            "anthropic_key" => format!("sk-ant-api03-{}AA", self.of(URL, 93)),
            "huggingface_token" => format!("hf_{}", self.of(BASE62, 34)),
            "databricks_token" => format!("dapi{}", self.of(HEX, 32)),
            "npm_token" => format!("npm_{}", self.of(BASE62, 36)),
            "pypi_token" => format!("pypi-AgEIcHlwaS5vcmc{}", self.of(URL, 120)),
            "dockerhub_token" => format!("dckr_pat_{}", self.of(URL, 27)),
            "sendgrid_key" => format!("SG.{}.{}", self.of(URL, 22), self.of(URL, 43)),
            "twilio_key" => format!("SK{}", self.of(HEX, 32)),
            "mailgun_key" => format!("key-{}", self.of(HEX, 32)),
            "digitalocean_token" => format!("dop_v1_{}", self.of(HEX, 64)),
            "vault_token" => format!("hvs.{}", self.of(URL, 90)),
            "age_secret_key" => format!("AGE-SECRET-KEY-1{}", self.of("QPZRY9X8GF2TVDW0S3JN54KHCE6MUA7L", 58)),
            "private_key" => format!("-----BEGIN RSA PRIVATE KEY-----\nMIIE{}\n", self.of(BASE62, 60)),
            "jwt" => format!("eyJ{}.eyJ{}.{}", self.of(BASE62, 33), self.of(BASE62, 80), self.of(URL, 43)),
            "url_password" => format!("postgres://app:{}@db.internal:5432/main", self.of(BASE62, 14)),
            "assigned_secret" => {
                let name = ["API_KEY", "client_secret", "\"password\"", "auth-token"][self.0.random_range(0..4)];
                format!("{name}: {}", self.of(BASE62, 24))
            }
            "email" => {
                let name = self.of("abcdefghijklmnopqrstuvwxyz", 6);
                format!("{name}.{}@{}.co.uk", self.of("abcdefghijklm", 5), self.of("abcdefghij", 7))
            }
            "phone" => match self.0.random_range(0..4) {
                0 => format!("+49 {} {}", 100 + self.0.random_range(0..800u32), self.digits(7)),
                1 => format!("({}) 555-{}", 201 + self.0.random_range(0..700u32), self.digits(4)),
                2 => format!("0{} {} {}", self.digits(2), self.digits(4), self.digits(4)),
                _ => format!("+1{}", 2_000_000_000 + self.0.random_range(0..7_000_000_000u64)),
            },
            "iban" => {
                let plain = self.iban();
                let groups: Vec<String> =
                    plain.as_bytes().chunks(4).map(|group| String::from_utf8_lossy(group).into_owned()).collect();
                if self.0.random_bool(0.5) { groups.join(" ") } else { plain }
            }
            "card" => match self.0.random_range(0..3) {
                0 => self.card("4", 16),
                1 => self.card("37", 15),
                _ => {
                    let plain = self.card("52", 16);
                    format!("{} {} {} {}", &plain[..4], &plain[4..8], &plain[8..12], &plain[12..])
                }
            },
            "us_ssn" => format!(
                "{}-{}-{}",
                100 + self.0.random_range(0..500u32),
                10 + self.0.random_range(0..89u32),
                1000 + self.0.random_range(0..8999u32)
            ),
            other => panic!("no issuer of {other}"),
        }
    }

    /// Draws what looks like a secret and is none.
    fn harmless(&mut self, kind: usize) -> String {
        match kind {
            0 => format!("commit {}", self.of(HEX, 40)),
            1 => format!(
                "{}-{}-4{}-a{}-{}",
                self.of(HEX, 8),
                self.of(HEX, 4),
                self.of(HEX, 3),
                self.of(HEX, 3),
                self.of(HEX, 12)
            ),
            2 => format!("order number 9{}", self.digits(15)),
            3 => format!("sha256:{}", self.of(HEX, 64)),
            4 => format!(
                "released on 20{}-0{}-1{}",
                10 + self.0.random_range(0..16u32),
                1 + self.0.random_range(0..9u32),
                self.digits(1)
            ),
            5 => "export API_KEY=<your-api-key-here>".into(),
            6 => "password = getpass.getpass('Enter the password: ')".into(),
            7 => "postgres://user:password@localhost:5432/db".into(),
            8 => format!(
                "the address 10.{}.{}.1 and port 8080",
                self.0.random_range(0..255u32),
                self.0.random_range(0..255u32)
            ),
            9 => format!("#{} on a background of #{}", self.of(HEX, 6), self.of(HEX, 6)),
            10 => format!("a table of 1{} rows and 2{} columns, 3.14159265358979", self.digits(5), self.digits(2)),
            11 => "What does the token bucket algorithm do, and where is the secret sauce?".into(),
            12 => format!("ISBN 978-0-{}-{}-{}", self.digits(4), self.digits(4), self.digits(1)),
            13 => format!("version {}.{}.{}-rc.{}", self.digits(1), self.digits(2), self.digits(2), self.digits(1)),
            14 => "sk-learn-is-not-the-name-of-the-scikit-learn-package".into(),
            15 => format!("data:image/png;base64,iVBORw0KGgo{}", self.of(BASE62, 60)),
            16 => "def handler(event, context): return {'statusCode': 200, 'body': token_count}".into(),
            _ => format!("sum of {} and {} and {}", self.digits(4), self.digits(4), self.digits(4)),
        }
    }
}

const SENTENCES: [&str; 4] = [
    "Please explain why this fails: {}",
    "I ran it with '{}' and got an error, what now?",
    "{}\nWrite a short summary of the text above.",
    "Fix the following config.\n```\nvalue: {}\n```\nThanks!",
];

#[test]
fn recall_and_precision_on_a_generated_set() {
    let mut issuer = Issuer(ChaCha8Rng::seed_from_u64(11));
    let mut recall: BTreeMap<&str, (usize, usize)> = BTreeMap::new();
    let (mut right, mut wrong) = (0, 0);
    for kind in all_kinds() {
        for i in 0..100 {
            let text = SENTENCES[i % 4].replace("{}", &issuer.secret(kind));
            let found = kinds(&text);
            let entry = recall.entry(kind).or_default();
            entry.0 += usize::from(found.contains(kind));
            entry.1 += 1;
            right += usize::from(!found.is_empty());
        }
    }
    let harmless = 18 * 200;
    for i in 0..harmless {
        let text = SENTENCES[i % 4].replace("{}", &issuer.harmless(i % 18));
        let found = kinds(&text);
        if !found.is_empty() {
            println!("false alarm {found:?}: {text}");
            wrong += 1;
        }
    }
    let (hits, all) = recall.values().fold((0, 0), |sum, (hits, all)| (sum.0 + hits, sum.1 + all));
    for (kind, (hits, all)) in &recall {
        println!("{kind:<26} {hits} of {all}");
        assert!(*hits as f64 >= 0.95 * *all as f64, "{kind}: {hits} of {all}");
    }
    let precision = right as f64 / (right + wrong) as f64;
    println!(
        "{} kinds: recall {hits} of {all} = {:.4}, precision {precision:.4} ({wrong} of {harmless} harmless)",
        recall.len(),
        hits as f64 / all as f64
    );
    assert!(recall.len() >= 25 && hits as f64 >= 0.99 * all as f64 && precision >= 0.99);
}

#[test]
fn each_kind_has_one_rule_and_kinds_do_not_hide_one_another() {
    let all: Vec<&str> = all_kinds().collect();
    assert_eq!(all.len(), all.iter().collect::<std::collections::BTreeSet<_>>().len());
    let text = "mail bob@example.org, card 4111 1111 1111 1111";
    assert_eq!(kinds(text).into_iter().collect::<Vec<_>>(), ["card", "email"]);
    assert!(is_kind("email") && !is_kind("e-mail"));
}
