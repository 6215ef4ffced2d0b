//! What the server has to say while it runs, as lines on standard error.

use std::fmt::{Debug, Write as _};
use std::time::SystemTime;

use serde_json::{Map, Value, json};
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};
use vhdkit::text::escape;

use crate::failure::Failure;
use crate::ui::Ui;

/// The variable that says how much is logged.
const VARIABLE: &str = "VHDKIT_LOG";

/// Takes events from here on, until the process ends.
pub(crate) fn install(ui: &Ui) -> Result<(), Failure> {
    let log = Log { level: level(ui)?, ui: *ui };
    // It fails when there is one already: then events have somewhere to go.
    let _ = tracing::subscriber::set_global_default(log);
    Ok(())
}

/// Up to which level events are of interest.
fn level(ui: &Ui) -> Result<LevelFilter, Failure> {
    let Some(text) = std::env::var_os(VARIABLE).filter(|text| !text.is_empty()) else {
        return Ok(match ui {
            Ui { quiet: true, .. } => LevelFilter::OFF,
            Ui { verbose: true, .. } => LevelFilter::INFO,
            _ => LevelFilter::WARN,
        });
    };
    let level = text.to_str().and_then(|text| text.parse().ok());
    level.ok_or_else(|| {
        let what = format!("{VARIABLE} is {}, which is no level", text.to_string_lossy());
        Failure::usage(what, "levels are off, error, warn, info, debug and trace")
    })
}

/// Writes events to standard error.
#[derive(Debug)]
struct Log {
    level: LevelFilter,
    ui: Ui,
}

impl Subscriber for Log {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && *metadata.level() <= self.level
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(self.level)
    }

    fn event(&self, event: &Event<'_>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let level = *event.metadata().level();
        let line = if self.ui.json { fields.to_json(level, SystemTime::now()) } else { fields.to_text(level) };
        self.ui.stderr_line(&line);
    }

    // Nobody makes spans here.
    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

/// What an event tells. All text is safe to print.
#[derive(Debug, Default)]
struct Fields {
    message: String,
    others: Map<String, Value>,
}

impl Fields {
    fn text(&mut self, field: &Field, text: &str) {
        let text = escape(text).into_owned();
        if field.name() == "message" {
            self.message = text;
        } else {
            self.others.insert(field.name().to_owned(), text.into());
        }
    }

    fn to_text(&self, level: Level) -> String {
        let level = match level {
            Level::ERROR => "error",
            Level::WARN => "warning",
            Level::INFO => "info",
            Level::DEBUG => "debug",
            Level::TRACE => "trace",
        };
        let mut line = format!("vhdkit: {level}: {}", self.message);
        for (index, (name, value)) in self.others.iter().enumerate() {
            let shown = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            let _ = write!(line, "{}{name}: {shown}", if index == 0 { " (" } else { ", " }); // a String takes it
        }
        if !self.others.is_empty() {
            line.push(')');
        }
        line
    }

    fn to_json(&self, level: Level, now: SystemTime) -> String {
        let since = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let mut log = Map::new();
        log.insert("level".to_owned(), level.as_str().to_ascii_lowercase().into());
        log.insert("time".to_owned(), since.as_secs_f64().into());
        log.insert("message".to_owned(), self.message.clone().into());
        log.extend(self.others.clone());
        json!({ "log": log }).to_string()
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.text(field, &format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.text(field, value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.others.insert(field.name().to_owned(), value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.others.insert(field.name().to_owned(), value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.others.insert(field.name().to_owned(), value.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn nothing_that_a_client_sent_reaches_the_terminal_as_it_is() {
        let mut fields = Fields { message: "cut off".to_owned(), ..Fields::default() };
        fields.others.insert("connection".to_owned(), 3.into());
        fields.others.insert("why".to_owned(), escape("\u{1b}[31m").into());
        assert_eq!(fields.to_text(Level::WARN), "vhdkit: warning: cut off (connection: 3, why: \\u{1b}[31m)");
        let json = fields.to_json(Level::WARN, SystemTime::UNIX_EPOCH + Duration::from_millis(1500));
        let value: Value = serde_json::from_str(&json).unwrap();
        assert_eq!(value["log"]["time"], 1.5);
        assert_eq!((&value["log"]["level"], &value["log"]["connection"]), (&"warn".into(), &3.into()));
    }
}
