//! The rehearsal: what clients asked lately is answered by the new version and by the one before it, at the server that will
//! serve it, and scored as the gate scores. The gate judged the adapter; this judges what the server makes of it.

use anyhow::{Result, bail};

use super::live::answers;
use crate::config::Config;
use crate::endpoint::EndpointError;
use crate::endpoint::server::{Answers, Question};
use crate::endpoint::watch::worse;
use crate::record::FinishReason;
use crate::rewards::{Item, Rewards};
use crate::table::{Name, Tables};

/// Compares the two names on the newest prompts; an error where the second is worse. Without prompts there is nothing to say.
pub(super) async fn rehearse(config: &Config, tables: &Tables, at: &dyn Answers, from: &str, to: &str) -> Result<()> {
    let settings = &config.endpoint.watch;
    if settings.shadow_prompts == 0 {
        return Ok(());
    }
    let queries = tables.open_one(Name::Queries).await?;
    let newest = format!("tools is null order by event_time desc limit {}", settings.shadow_prompts);
    let asked = answers(config, &queries, &newest).await?;
    if asked.is_empty() {
        return Ok(());
    }
    let rewards = Rewards::without_base(&config.rewards, &config.workload)?;
    let asked = asked.into_iter().filter_map(super::live::Answer::item);
    let asked: Vec<Item> = asked.filter(|item| rewards.covers(item.workload.as_deref())).collect();
    let (mut old, mut new) = (Vec::new(), Vec::new());
    for item in asked {
        let ask = async |model: &str| {
            at.ask(&Question { model, messages: &item.messages, max_tokens: config.decoding.max_tokens }).await
        };
        let before = match ask(from).await {
            // With our length of answer it does not fit the server, whichever version is asked.
            Err(EndpointError::Status { status: 400 | 413 | 422, .. }) => continue,
            reply => reply?,
        };
        for (reply, side) in [(before, &mut old), (ask(to).await?, &mut new)] {
            let length = reply.finish_reason.as_deref() == Some(FinishReason::Length.as_str());
            let finish_reason = if length { FinishReason::Length } else { FinishReason::Stop };
            side.push(Item { response: reply.text, finish_reason, ..item.clone() });
        }
    }
    let scored = move || Ok::<_, crate::rewards::RewardError>((rewards.gate(&old)?, rewards.gate(&new)?));
    let (old, new) = tokio::task::spawn_blocking(scored).await??;
    let differences: Vec<f64> = new.iter().zip(&old).map(|(new, old)| new.total - old.total).collect();
    match worse(&differences, settings) {
        Some(why) => bail!(why),
        None => {
            tracing::info!(prompts = differences.len(), from, to, "rehearsed on what clients asked lately");
            Ok(())
        }
    }
}
