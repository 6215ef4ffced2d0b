//! Holds `docs/format.md` against the table of codes in the library.

use vhdkit::format::finding::{Code, Severity, Strictness};

/// The numbers of the rules.
fn numbers() -> impl Iterator<Item = u32> {
    (1..=21).chain(30..=55).chain(60..=74).chain(80..=107).chain(110..=129).chain(140..=157)
}

/// How the document writes a code's severities: one letter where all levels agree.
fn letters(code: Code) -> String {
    let levels = [Strictness::Lenient, Strictness::Normal, Strictness::Strict];
    let letters: String = levels
        .iter()
        .map(|level| match code.severity(*level) {
            Severity::Note => 'N',
            Severity::Warning => 'W',
            Severity::Error => 'E',
        })
        .collect();
    match letters.as_str() {
        "NNN" | "WWW" | "EEE" => letters.chars().take(1).collect(),
        _ => letters,
    }
}

/// What the document says otherwise than the code; empty when they agree.
fn differences(document: &str) -> Vec<String> {
    let rows = |rule: &str| -> Vec<&str> {
        let start = format!("| {rule} |");
        document.lines().filter(|line| line.starts_with(&start)).collect()
    };
    let mut wrong = Vec::new();
    for number in numbers() {
        let rule = format!("V-{number:03}");
        if rows(&rule).len() != 1 {
            wrong.push(format!("{rule} has {} rows", rows(&rule).len()));
        }
    }
    for code in Code::ALL {
        let expected = format!("{} `{code}`", letters(*code));
        let spaced = format!(" {expected}");
        if !rows(code.rule()).iter().any(|row| row.contains(&spaced)) {
            wrong.push(format!("the row of {} does not say: {expected}", code.rule()));
        }
    }
    wrong
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shell::root;

    fn document() -> String {
        std::fs::read_to_string(root().unwrap().join("docs/format.md")).unwrap()
    }

    #[test]
    fn the_format_document_names_every_rule_and_code_with_its_severities() {
        assert_eq!(differences(&document()), [""; 0]);
    }

    #[test]
    fn a_wrong_severity_is_noticed() {
        let broken = document().replace("NWE `bat-unused-offset`", "W `bat-unused-offset`");
        assert_eq!(differences(&broken), ["the row of V-117 does not say: NWE `bat-unused-offset`"]);
    }
}
