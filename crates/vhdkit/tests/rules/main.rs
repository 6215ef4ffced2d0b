//! The rules V-001 to V-157 as a table: what each way to look at an image says to each violation.
//!
//! A row has an image, well-formed but for one thing, and says for lenient, normal and strict judgement what opening for
//! reading, reading a block, opening for writing and `check` do about it, with kind and code of the error. Rules that
//! make readers accept something have an image that a careless reader gets wrong. Every image is compared byte by byte
//! afterwards: nothing may have written to it. A rule without a row that breaks it fails the test, as does a code that no
//! row expects.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "test code"
)]

mod bat;
mod headers;
mod judge;
mod locator;
mod log_bounds;
mod log_replay;
mod log_scan;
mod metadata;
mod parent_paths;
mod parents;
mod regions;
mod repair;
mod ring;
mod table;

use std::collections::{BTreeSet, HashSet};

use vhdkit::format::finding::Code;
use vhdkit_testkit::harness::{Case, Needs, main_with};

use table::{Judge, Level, Notes, Outcome, Refuses, Row, Warns};

/// The rules that there are, as ranges of numbers.
const RULES: [std::ops::RangeInclusive<u32>; 6] = [1..=21, 30..=55, 60..=74, 80..=107, 110..=129, 140..=157];

/// Rules that no image can break: they say what a reader must accept, and their rows show that it reads it rightly.
const ACCEPTING: &[u32] = &[
    3, 8, 21, 30, 34, 35, 37, 38, 39, 41, 42, 43, 44, 45, 46, 51, 52, 53, 73, 91, 97, 123, 124, 125, 126, 127, 128,
    147, 156, 157,
];

/// Rules whose violation is reported under another rule's number.
const REPORTED_AS: &[(u32, u32)] = &[
    (4, 7), // an invalid slot is reported as such when the other one is used
    (5, 7),
    (33, 32), // an entry that is none leaves no sequence
    (36, 32),
    (50, 32),
    (54, 31), // replay in place is for writers
    (155, 6), // the parent's own
];

fn rows() -> Vec<Row> {
    let mut rows = headers::rows();
    rows.extend(log_scan::rows());
    rows.extend(log_replay::rows());
    rows.extend(log_bounds::rows());
    rows.extend(regions::rows());
    rows.extend(metadata::rows());
    rows.extend(bat::rows());
    rows.extend(locator::rows());
    rows.extend(parents::rows());
    rows.extend(parent_paths::rows());
    rows
}

fn outcomes(row: &Row) -> Vec<Outcome> {
    match &row.judge {
        Judge::Image { expect, .. } => {
            let all = |level: &Level| [level.read, level.page, level.write, level.check];
            expect.levels.iter().flat_map(all).collect()
        }
        Judge::Special { .. } => Vec::new(),
    }
}

/// The codes that a row expects.
fn codes(row: &Row) -> Vec<Code> {
    let mut codes: Vec<Code> = outcomes(row)
        .into_iter()
        .filter_map(|outcome| match outcome {
            Warns(code) | Notes(code) => Some(code),
            Refuses(_, code) => code,
            _ => None,
        })
        .collect();
    if let Judge::Special { codes: special, .. } = &row.judge {
        codes.extend(special);
    }
    codes
}

fn number(rule: &str) -> u32 {
    rule.strip_prefix("V-").filter(|digits| digits.len() == 3).and_then(|digits| digits.parse().ok()).unwrap()
}

fn every_rule_has_a_row() {
    let seen: BTreeSet<u32> = rows().iter().map(|row| number(row.rule)).collect();
    let wanted: BTreeSet<u32> = RULES.into_iter().flatten().collect();
    assert_eq!(seen, wanted);
}

fn every_rule_is_broken_by_a_row() {
    let rows = rows();
    for rule in RULES.into_iter().flatten() {
        let reported = REPORTED_AS.iter().find(|(other, _)| *other == rule).map_or(rule, |(_, reported)| *reported);
        let of_rule: Vec<&Row> = rows.iter().filter(|row| number(row.rule) == rule).collect();
        let name = format!("V-{reported:03}");
        let broken = of_rule.iter().any(|row| codes(row).iter().any(|code| code.rule() == name));
        let compared = of_rule.iter().any(|row| outcomes(row).contains(&table::Accept));
        let accepting = ACCEPTING.contains(&rule);
        assert!(broken || accepting, "no row breaks V-{rule:03}");
        assert!(compared || !accepting, "no row shows that V-{rule:03} is read rightly");
    }
}

fn every_code_is_expected() {
    let seen: HashSet<Code> = rows().iter().flat_map(codes).collect();
    let missing: Vec<&Code> = Code::ALL.iter().filter(|code| !seen.contains(code)).collect();
    assert!(missing.is_empty(), "no row expects {missing:?}");
}

fn expectations_agree() {
    for row in rows() {
        if let Judge::Image { expect, .. } = &row.judge {
            assert_eq!(judge::contradiction(expect), None, "{}: {}", row.rule, row.name);
        }
    }
}

fn names_are_unique() {
    let mut seen = HashSet::new();
    for row in rows() {
        assert!(seen.insert((row.rule, row.name.clone())), "{}: {}", row.rule, row.name);
    }
}

fn main() {
    let mut cases = vec![
        Case::new("every_rule_has_a_row", Needs::nothing(), every_rule_has_a_row),
        Case::new("every_rule_is_broken_by_a_row", Needs::nothing(), every_rule_is_broken_by_a_row),
        Case::new("every_code_is_expected", Needs::nothing(), every_code_is_expected),
        Case::new("expectations_agree", Needs::nothing(), expectations_agree),
        Case::new("names_are_unique", Needs::nothing(), names_are_unique),
    ];
    cases.extend(rows().into_iter().filter_map(|row| {
        let Judge::Image { make, .. } = row.judge else { return None };
        let run = move || {
            repair::expect(&repair::judge(&make()));
        };
        Some(Case::new(format!("repair, {}: {}", row.rule, row.name), Needs::nothing(), run))
    }));
    cases.extend(rows().into_iter().map(|row| {
        let name = format!("{}: {}", row.rule, row.name);
        let run = move || match row.judge {
            Judge::Image { make, expect } => judge::judge(make(), &expect),
            Judge::Special { run, codes } => assert_eq!(run(), codes),
        };
        Case::new(name, Needs::nothing(), run)
    }));
    main_with(cases);
}
