//! Joining children and parents, and saying what is wrong where that fails.

use std::collections::HashMap;
use std::ffi::OsString;
use std::path::Path;

use super::survey::{Entry, Found, Survey};
use super::{ChainReport, ChildLink, Node, Remedy, Trouble, TroubleKind};
use crate::error::ErrorKind;
use crate::format::guid::Guid;
use crate::image::CHAIN_DEPTH_MAX;
use crate::image::file_resolver::is_place_of;
use crate::storage::StorageIdentity;
use crate::text::escape;

/// Copies of a parent that are named in a message.
const COPIES_SHOWN: usize = 3;

/// Makes trees of what was found: all of them, or the one in which an image stands.
pub(super) fn join(mut survey: Survey<'_>, wanted: Option<StorageIdentity>) -> ChainReport {
    let mut by_guid: HashMap<Guid, Vec<usize>> = HashMap::new();
    for (index, found) in survey.found.iter().enumerate() {
        if !found.node.data_write_guid.is_nil() {
            by_guid.entry(found.node.data_write_guid).or_default().push(index);
        }
    }
    let judged: Vec<Judged> = (0..survey.found.len()).map(|index| judge(&survey, &by_guid, index)).collect();
    for (found, judged) in survey.found.iter_mut().zip(judged) {
        found.node.parent = judged.parent;
        found.node.link = judged.link;
        found.node.troubles = judged.troubles;
    }
    let mut nodes: Vec<Node> = Vec::with_capacity(survey.found.len());
    let mut wanted_index = None;
    for (index, found) in survey.found.into_iter().enumerate() {
        if wanted == Some(found.identity) {
            wanted_index = Some(index);
        }
        nodes.push(found.node);
    }
    cut_cycles(&mut nodes);
    ChainReport { nodes: in_trees(nodes, wanted_index), damaged: survey.damaged, skipped: survey.skipped }
}

/// What is known of the link of one image.
#[derive(Debug, Default)]
struct Judged {
    parent: Option<usize>,
    link: Option<ChildLink>,
    troubles: Vec<Trouble>,
}

fn judge(survey: &Survey<'_>, by_guid: &HashMap<Guid, Vec<usize>>, index: usize) -> Judged {
    let Some(child) = survey.found.get(index).filter(|found| found.has_parent) else { return Judged::default() };
    let image = |candidate: StorageIdentity| match survey.known.get(&candidate) {
        Some(Entry::Image(other)) => survey.found.get(*other).map(|found| (*other, found)),
        _ => None,
    };
    for candidate in &child.candidates {
        let Some((parent, found)) = image(candidate.identity) else { continue };
        if let Some(link) = accepts(&child.node, found.node.data_write_guid) {
            let mut troubles = Vec::new();
            if child.node.logical_sector_size != found.node.logical_sector_size {
                troubles.push(sector_size(&child.node, &found.node));
                return Judged { parent: Some(parent), link: None, troubles };
            }
            troubles.extend(stale_path(child, &candidate.path, &found.node));
            troubles.extend(merge_begun(&child.node, &found.node, link));
            return Judged { parent: Some(parent), link: Some(link), troubles };
        }
    }
    // Nothing is where the image says, or the wrong thing: perhaps the right one is somewhere else.
    let follows_paths = survey.follows_paths();
    for (guid, link) in [(child.node.linkage, ChildLink::Linkage), (child.node.linkage2, ChildLink::Linkage2)] {
        let copies = guid.and_then(|guid| by_guid.get(&guid)).map(Vec::as_slice).unwrap_or_default();
        let copies: Vec<(usize, &Found)> = copies
            .iter()
            .filter(|other| **other != index)
            .filter_map(|other| Some((*other, survey.found.get(*other)?)))
            .collect();
        let beside = copies.iter().find(|(_, found)| found.node.path.parent() == child.node.path.parent());
        let Some((parent, found)) = beside.or(copies.first()) else { continue };
        if child.node.logical_sector_size != found.node.logical_sector_size {
            return Judged { parent: Some(*parent), link: None, troubles: vec![sector_size(&child.node, &found.node)] };
        }
        if !follows_paths {
            let troubles = merge_begun(&child.node, &found.node, link).into_iter().collect();
            return Judged { parent: Some(*parent), link: Some(link), troubles };
        }
        let others: Vec<&Node> = copies.iter().filter(|(other, _)| other != parent).map(|(_, f)| &f.node).collect();
        let troubles = vec![moved(child, &found.node, &others)];
        return Judged { parent: Some(*parent), link: None, troubles };
    }
    let standing = child.candidates.iter().find_map(|candidate| image(candidate.identity));
    let parent = standing.map(|(parent, _)| parent).filter(|parent| *parent != index);
    Judged { parent, link: None, troubles: vec![lost(survey, child, standing.map(|(_, found)| &found.node))] }
}

/// By what a child knows a parent with this identity.
fn accepts(child: &Node, found: Guid) -> Option<ChildLink> {
    let is_it = |linkage: Option<Guid>| linkage.is_some_and(|guid| !guid.is_nil() && guid == found);
    if is_it(child.linkage) {
        Some(ChildLink::Linkage)
    } else if is_it(child.linkage2) {
        Some(ChildLink::Linkage2)
    } else {
        None
    }
}

fn shown(path: &Path) -> String {
    format!("\"{}\"", escape(&path.to_string_lossy()))
}

fn reparent(child: &Node, parent: &Node, what: String, anyway: bool) -> Remedy {
    let mut arguments: Vec<OsString> = vec!["reparent".into(), child.path.clone().into(), parent.path.clone().into()];
    if anyway {
        arguments.push("--ignore-id-mismatch".into());
    }
    Remedy { what, arguments }
}

fn by_hand(what: impl Into<String>) -> Remedy {
    Remedy { what: what.into(), arguments: Vec::new() }
}

fn sector_size(child: &Node, parent: &Node) -> Trouble {
    let (own, other) = (child.logical_sector_size, parent.logical_sector_size);
    let message = format!("its parent {} has logical sectors of {other} bytes, it has {own}", shown(&parent.path));
    let remedies = vec![by_hand("no reader takes such a chain: one of the two files was changed; get its copy back")];
    Trouble { kind: TroubleKind::SectorSize, message, remedies }
}

fn stale_path(child: &Found, place: &Path, parent: &Node) -> Option<Trouble> {
    let relative = child.relative_path.as_ref()?;
    if is_place_of(&child.node.path, relative, place) {
        return None;
    }
    let message = format!("its parent is found at {}, but not where its relative path says", shown(&parent.path));
    let what = "makes the path right, so that every program finds the parent".to_owned();
    let remedies = vec![reparent(&child.node, parent, what, false)];
    Some(Trouble { kind: TroubleKind::StalePath, message, remedies })
}

fn merge_begun(child: &Node, parent: &Node, link: ChildLink) -> Option<Trouble> {
    let second = child.linkage2.filter(|second| Some(*second) != child.linkage)?;
    let merge =
        |what: &str| Remedy { what: what.to_owned(), arguments: vec!["merge".into(), child.path.clone().into()] };
    let (message, remedies) = if link == ChildLink::Linkage2 {
        let message =
            "a merge into its parent was begun and not finished; nothing is lost, the chain reads as it should";
        (message.to_owned(), vec![merge("finishes the merge")])
    } else {
        let message =
            format!("a merge into its parent was to begin (under the identity {second}); nothing was merged yet");
        let forget = reparent(child, parent, "forgets the merge".to_owned(), false);
        (message, vec![merge("merges it"), forget])
    };
    Some(Trouble { kind: TroubleKind::MergeBegun, message, remedies })
}

fn moved(child: &Found, parent: &Node, others: &[&Node]) -> Trouble {
    let mut message = format!("its parent is not where it says, but at {}", shown(&parent.path));
    if !others.is_empty() {
        let copies: Vec<String> = others.iter().take(COPIES_SHOWN).map(|other| shown(&other.path)).collect();
        message.push_str(&format!("; copies of that are {}", copies.join(", ")));
        if others.len() > COPIES_SHOWN {
            message.push_str(" and more");
        }
    }
    if let Some(wrong) = child.candidates.first() {
        message.push_str(&format!("; at its place lies {}, which is not the parent", shown(&wrong.path)));
    }
    let what = "makes the path lead to it; its identity is right".to_owned();
    Trouble { kind: TroubleKind::Moved, message, remedies: vec![reparent(&child.node, parent, what, false)] }
}

/// The parent is nowhere: says why. `standing` is the image at its place.
fn lost(survey: &Survey<'_>, child: &Found, standing: Option<&Node>) -> Trouble {
    if let Some(standing) = standing {
        return wrong_one(&child.node, standing);
    }
    let unreadable = |message: String, path: &str| Trouble {
        kind: TroubleKind::Unreadable,
        message,
        remedies: vec![by_hand(format!("get {path} back from a copy, or see `vhdkit check` and `vhdkit repair`"))],
    };
    if let Some(candidate) = child.candidates.first() {
        let place = shown(&candidate.path);
        let why = match survey.known.get(&candidate.identity) {
            Some(Entry::Damaged(index)) => survey.damaged.get(*index).map(|error| escape(error.message()).into_owned()),
            _ => None,
        };
        let why = why.unwrap_or_else(|| "it is not a VHDX".to_owned());
        return unreadable(format!("what lies at the place of its parent, {place}, cannot be opened: {why}"), &place);
    }
    let expected = child.node.linkage.map(|guid| format!(" (data write GUID {guid})")).unwrap_or_default();
    let restore = || by_hand(format!("get the parent{expected} back from a copy, and put it where the image says"));
    let look = || by_hand("if it is somewhere else, say where with --parent-dir DIR or --parent FILE");
    let Some(error) = &child.refused else {
        let message = "its parent is not among the files that were looked at".to_owned();
        return Trouble { kind: TroubleKind::Missing, message, remedies: vec![look(), restore()] };
    };
    let message = escape(error.message()).into_owned();
    match error.kind() {
        ErrorKind::ParentNotFound => Trouble { kind: TroubleKind::Missing, message, remedies: vec![look(), restore()] },
        ErrorKind::ParentDenied => Trouble { kind: TroubleKind::Denied, message, remedies: vec![look()] },
        _ => {
            let why = std::error::Error::source(error).map(|source| format!(": {source}")).unwrap_or_default();
            unreadable(format!("{message}{}", escape(&why)), "the parent")
        }
    }
}

/// At the parent's place stands an image that is not the one.
fn wrong_one(child: &Node, standing: &Node) -> Trouble {
    let (place, found) = (shown(&standing.path), standing.data_write_guid);
    let expected = child.linkage.filter(|guid| !guid.is_nil()).or(child.linkage2);
    let Some(expected) = expected else {
        let message = format!("it names {place} as its parent, but not by any identity");
        let what = "makes that its parent for good; only if you know that it is, and was not changed since".to_owned();
        let remedies = vec![reparent(child, standing, what, true)];
        return Trouble { kind: TroubleKind::Unidentified, message, remedies };
    };
    let message = format!(
        "{place} was changed after the image was made from it, or is another image: its data write GUID is {found}, \
         expected is {expected}"
    );
    let what = "takes it as it is now: whatever the image did not change itself reads as that holds it today, so that file \
                systems may be damaged in ways that nobody notices at once; only for a parent whose disk is still the same";
    let remedies = vec![
        by_hand("get back the copy of the parent from before the change; with it nothing is lost"),
        reparent(child, standing, what.to_owned(), true),
    ];
    Trouble { kind: TroubleKind::Changed, message, remedies }
}

/// Takes images that are their own ancestors out of their trees.
fn cut_cycles(nodes: &mut [Node]) {
    let mut state = vec![0_usize; nodes.len()]; // 0: not seen; otherwise the walk that saw it
    for start in 0..nodes.len() {
        let walk = start.saturating_add(1);
        let mut at = Some(start);
        while let Some(index) = at {
            let Some(seen) = state.get_mut(index) else { break };
            if *seen == 0 {
                *seen = walk;
                at = nodes.get(index).and_then(|node| node.parent);
                continue;
            }
            if *seen == walk {
                cut_cycle(nodes, index);
            }
            break;
        }
    }
}

/// Every image of the cycle on which `first` lies becomes a root.
fn cut_cycle(nodes: &mut [Node], first: usize) {
    let mut cycle = vec![first];
    let parent_of = |nodes: &[Node], index: usize| nodes.get(index).and_then(|node| node.parent);
    let mut at = parent_of(nodes, first);
    while let Some(index) = at.filter(|index| *index != first) {
        cycle.push(index);
        at = parent_of(nodes, index);
    }
    for index in cycle {
        let by = parent_of(nodes, index).and_then(|parent| nodes.get(parent)).map(|parent| shown(&parent.path));
        let Some(node) = nodes.get_mut(index) else { continue };
        let message = format!("its chain of parents comes back to itself, by way of {}", by.unwrap_or_default());
        let remedies = vec![by_hand("one of the links was changed: get back the image whose parent is wrong")];
        node.troubles = vec![Trouble { kind: TroubleKind::Cycle, message, remedies }];
        node.link = None;
    }
    // Only now: each message needed the link of the next one.
    let mut at = Some(first);
    while let Some(node) = at.and_then(|index| nodes.get_mut(index)) {
        at = node.parent.take();
    }
}

/// The nodes in the order in which they are drawn, every one behind its parent: all, or the tree in which one stands.
fn in_trees(nodes: Vec<Node>, wanted: Option<usize>) -> Vec<Node> {
    let mut children: Vec<Vec<usize>> = vec![Vec::new(); nodes.len()];
    let mut roots = Vec::new();
    for (index, node) in nodes.iter().enumerate() {
        match node.parent.and_then(|parent| children.get_mut(parent)) {
            Some(siblings) => siblings.push(index),
            None => roots.push(index),
        }
    }
    let by_path = |index: &usize| nodes.get(*index).map(|node| node.path.clone());
    for siblings in children.iter_mut().chain([&mut roots]) {
        siblings.sort_by_cached_key(by_path);
    }
    if let Some(wanted) = wanted {
        let mut root = wanted;
        while let Some(parent) = nodes.get(root).and_then(|node| node.parent) {
            root = parent; // ends: cycles were cut
        }
        roots = vec![root];
    }
    let mut nodes: Vec<Option<Node>> = nodes.into_iter().map(Some).collect();
    let mut ordered: Vec<Node> = Vec::with_capacity(nodes.len());
    // Where to go on: the node, its parent in the new order, how deep it stands.
    let mut waiting: Vec<(usize, Option<usize>, usize)> = roots.iter().rev().map(|root| (*root, None, 0)).collect();
    while let Some((index, parent, depth)) = waiting.pop() {
        let Some(mut node) = nodes.get_mut(index).and_then(Option::take) else { continue };
        (node.parent, node.depth) = (parent, depth);
        if depth >= CHAIN_DEPTH_MAX && node.link.is_some() {
            let message = format!("it has more than {} ancestors, so that it cannot be opened", CHAIN_DEPTH_MAX - 1);
            let remedies = vec![by_hand("merge some of its ancestors first")];
            node.troubles.push(Trouble { kind: TroubleKind::TooDeep, message, remedies });
        }
        let place = ordered.len();
        ordered.push(node);
        let below = children.get(index).map(Vec::as_slice).unwrap_or_default();
        waiting.extend(below.iter().rev().map(|child| (*child, Some(place), depth.saturating_add(1))));
    }
    ordered
}
