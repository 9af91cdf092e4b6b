"""What the structure channels say of a C++ syntax tree: categories, node types, macros.

- `MAPPING_VERSION`: goes into the data; raise it with any change of what bytes are painted
- `CATEGORIES`: the nine kinds of code, in the order of their ids
- `NODE_TYPES` and `node_type_bucket`: named nodes of tree-sitter-cpp into 256 buckets, by name
- `without_macros`: sources as the parser gets them

Names decide, not the numbers that a release of the grammar gives them. A grammar's new name goes
to `OTHER_NODE` until it is appended here, which is a new version of the mapping. Another release
of the grammar can make other trees of the same bytes; its version is not part of the mapping's.
"""

from __future__ import annotations

import functools
import re

MAPPING_VERSION = 1


def words(text: str) -> frozenset[str]:
    """Return the words of a text."""
    return frozenset(text.split())


CATEGORIES = (
    "preamble",  # preprocessor lines (not the code between #if and #endif), using declarations
    "function signature",  # functions outside of classes, their bodies left out
    "function body",  # compound statements, constructors' initializer lists
    "class declaration",  # head, braces and access specifiers of class, struct, union, enum
    "class member",  # fields, enumerators, methods without their bodies
    "comment",
    "typedef",  # and alias declarations
    "namespace",  # head and braces of namespace and extern "C", namespace aliases
    "other",
)

# Buckets 0 to 9, not all taken: nodes without a name of their own.
OTHER_NODE, DIRECTIVE, KEYWORD, BRACKET, SEPARATOR, OPERATOR, QUOTE, LINE_END = range(8)
FIRST_NAMED = 10

_NODE_TYPES = """
abstract_array_declarator abstract_function_declarator abstract_parenthesized_declarator
abstract_pointer_declarator abstract_reference_declarator access_specifier alias_declaration
alignas_qualifier alignof_expression argument_list array_declarator assignment_expression attribute
attribute_declaration attribute_specifier attributed_declarator attributed_statement auto
base_class_clause binary_expression bitfield_clause break_statement call_expression case_statement
cast_expression catch_clause char_literal character class_specifier co_await_expression
co_return_statement co_yield_statement comma_expression comment compound_literal_expression
compound_requirement compound_statement concatenated_string concept_definition condition_clause
conditional_expression constraint_conjunction constraint_disjunction continue_statement declaration
declaration_list decltype default_method_clause delete_expression delete_method_clause
dependent_name dependent_type destructor_name do_statement else_clause enum_specifier enumerator
enumerator_list escape_sequence explicit_function_specifier expression_statement
extension_expression false field_declaration field_declaration_list field_designator
field_expression field_identifier field_initializer field_initializer_list fold_expression
for_range_loop for_statement friend_declaration function_declarator function_definition
generic_expression gnu_asm_clobber_list gnu_asm_expression gnu_asm_goto_list gnu_asm_input_operand
gnu_asm_input_operand_list gnu_asm_output_operand gnu_asm_output_operand_list gnu_asm_qualifier
goto_statement identifier if_statement init_declarator init_statement initializer_list
initializer_pair labeled_statement lambda_capture_initializer lambda_capture_specifier
lambda_default_capture lambda_expression linkage_specification literal_suffix ms_based_modifier
ms_call_modifier ms_declspec_modifier ms_pointer_modifier ms_restrict_modifier
ms_signed_ptr_modifier ms_unaligned_ptr_modifier ms_unsigned_ptr_modifier
namespace_alias_definition namespace_definition namespace_identifier nested_namespace_specifier
new_declarator new_expression noexcept null number_literal offsetof_expression operator_cast
operator_name optional_parameter_declaration optional_type_parameter_declaration
parameter_declaration parameter_list parameter_pack_expansion parenthesized_declarator
parenthesized_expression placeholder_type_specifier pointer_declarator pointer_expression
pointer_type_declarator preproc_arg preproc_call preproc_def preproc_defined preproc_directive
preproc_elif preproc_elifdef preproc_else preproc_function_def preproc_if preproc_ifdef
preproc_include preproc_params primitive_type pure_virtual_clause qualified_identifier
raw_string_content raw_string_delimiter raw_string_literal ref_qualifier reference_declarator
requirement_seq requires_clause requires_expression return_statement seh_except_clause
seh_finally_clause seh_leave_statement seh_try_statement simple_requirement sized_type_specifier
sizeof_expression statement_identifier static_assert_declaration storage_class_specifier
string_content string_literal struct_specifier structured_binding_declarator
subscript_argument_list subscript_designator subscript_expression subscript_range_designator
switch_statement system_lib_string template_argument_list template_declaration template_function
template_instantiation template_method template_parameter_list
template_template_parameter_declaration template_type this throw_specifier throw_statement
trailing_return_type translation_unit true try_statement type_definition type_descriptor
type_identifier type_parameter_declaration type_qualifier type_requirement unary_expression
union_specifier update_expression user_defined_literal using_declaration variadic_declarator
variadic_parameter_declaration variadic_type_parameter_declaration virtual_specifier
while_statement
"""
NODE_TYPES = tuple(_NODE_TYPES.split())
_NAMED = {name: FIRST_NAMED + place for place, name in enumerate(NODE_TYPES)}
_BRACKETS = words("( ) [ ] { } [[ ]] () []")
_SEPARATORS = words(", ; : :: ...")


def node_type_bucket(name: str, named: bool) -> int:
    """Return the bucket, 0 to 255, of the grammar's nodes of a name.

    Args:
        name: As the grammar spells it; of unnamed nodes, their text.
        named: Whether it is a rule of the grammar, and not a piece of text in a rule.
    """
    if named:
        return _NAMED.get(name, OTHER_NODE)
    if name.startswith("#"):
        return DIRECTIVE
    if name[-1:] in ('"', "'"):
        return QUOTE
    if name[:1].isalpha() or name[:1] == "_":
        return KEYWORD
    if name == "\n":
        return LINE_END
    if name in _BRACKETS:
        return BRACKET
    return SEPARATOR if name in _SEPARATORS else OPERATOR


# The least height (`dependencies.py`) of every dependency level but the first: one by one, then
# four thirds of the one before. Heights reach 72 in torch's headers, and two bytes in three lie
# above 15.
DEPENDENCY_BOUNDS = (1, 2, 3, 4, 5, 6, 7, 8, 11, 15, 20, 27, 36, 48, 64)

# Parts of the names of macros that stand for attributes, specifiers or nothing.
_SAYS_NOTHING = words(
    """
    ABI API ATTRIBUTE ATTRIBUTES COLD CONST CONSTEVAL CONSTEXPR CONSTINIT DEPRECATED DEVICE
    DIAGNOSTIC EXPORT EXTERN FORCEINLINE GLOBAL HIDDEN HOST HOT IMPORT INLINE INTRINSIC KERNEL MUST
    NAMESPACE NODISCARD NOEXCEPT NOINLINE NORETURN PRAGMA PURE RESTRICT UNROLL UNUSED VISIBILITY
    WEAK
    """
)
# Words with two underscores on both sides that the grammar knows.
_KNOWN_WORDS = words(
    "__alignof__ __asm__ __attribute__ __extension__ __inline__ __restrict__ __volatile__"
)
# A name in capitals, perhaps with arguments, or a word between underscores, with a word after it;
# and CUDA's words also before the parameters of a lambda.
_MACRO = re.compile(
    rb"[A-Z_](?<!\w.)(?:"
    rb"[A-Z0-9_]+(?:[ \t]*\([^()\n]*\))?(?=\s+[A-Za-z_~])"
    rb"|_launch_bounds__[ \t]*\([^()\n]*\)|_(?:host|device)__(?!\w)|_[a-z_]+__(?=\s+[A-Za-z_~])"
    rb")"
)
_CLASS_KEY = re.compile(rb"\b(?:class|struct|union|enum)\s+\Z")
_CLASS_NAME = re.compile(rb"\s+[\w:]+(?:\s*<[^;{}]*>)?(?:\s+final)?\s*(?:\{|:[^:])")


def without_macros(content: bytes) -> bytes:
    """Return a source of the same length with macros blanked that no grammar could place.

    `class PROJECT_API Name` and `PROJECT_INLINE int name()` are C++ only after the preprocessor,
    and a parser without one takes the wrong word for the name. Blanked are names in capitals that
    have another word after them and either a part that speaks of linkage, inlining and the like,
    or a place between `class` and the name of a class that is defined; and words such as
    `__device__`. Lines of the preprocessor stay.
    """
    return _MACRO.sub(lambda found: _blank(found, content), content)


def _blank(found: re.Match[bytes], content: bytes) -> bytes:
    name = found[0].partition(b"(")[0].strip()
    if not _says_nothing(name) and not _stands_before_class_name(found, content):
        return found[0]
    line = content[content.rfind(b"\n", 0, found.start()) + 1 : found.start()]
    return found[0] if line.lstrip().startswith(b"#") else b" " * len(found[0])


@functools.lru_cache(maxsize=4096)
def _says_nothing(name: bytes) -> bool:
    text = name.decode()
    if text.startswith("__") and text.endswith("__") and text.islower():
        return text not in _KNOWN_WORDS
    parts = [part.rstrip("0123456789") for part in text.split("_")]
    return any(part in _SAYS_NOTHING or part.endswith("API") for part in parts)


def _stands_before_class_name(found: re.Match[bytes], content: bytes) -> bool:
    before = content[max(0, found.start() - 20) : found.start()]
    return bool(_CLASS_KEY.search(before) and _CLASS_NAME.match(content, found.end()))
